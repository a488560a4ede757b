"""GitHub's API for pull requests, as far as it is used here, over the wire."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class GitHub:
    """What the server has, and how it behaves.

    Attributes:
        lose_answers: so many creations are carried out and answered by a cut connection.
        status: answered to everything, where set.
    """

    token: str
    url: str = ""
    pulls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    lose_answers: int = 0
    status: int | None = None


@contextlib.contextmanager
def github_api(token: str) -> Generator[GitHub]:  # noqa: C901 - a handler that knows its server
    """A server of its own."""
    state = GitHub(token)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, status: int, body: Any) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def _refused(self) -> bool:
            if state.status is not None:
                self._answer(state.status, {"message": "made to fail"})
                return True
            if self.headers.get("Authorization") != f"Bearer {state.token}":
                self._answer(401, {"message": "Bad credentials"})
                return True
            return False

        def do_GET(self) -> None:
            if self._refused():
                return
            wanted = parse_qs(urlsplit(self.path).query).get("head", [""])[0].partition(":")[2]
            self._answer(200, [it for it in state.pulls if it["head"]["ref"] == wanted])

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._refused():
                return
            if any(it["head"]["ref"] == sent["head"] for it in state.pulls):
                message = f"A pull request already exists for o:{sent['head']}."
                self._answer(
                    422, {"message": "Validation Failed", "errors": [{"message": message}]}
                )
                return
            number = len(state.pulls) + 1
            made = {
                **sent,
                "number": number,
                "html_url": f"https://github.invalid/o/r/pull/{number}",
                "head": {"ref": sent["head"]},
                "base": {"ref": sent["base"]},
            }
            state.pulls.append(made)
            if state.lose_answers:
                state.lose_answers -= 1
                self.close_connection = True
                self.connection.close()
                return
            self._answer(201, made)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
