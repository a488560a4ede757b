"""A real `dagster dev` for tests, and the questions they ask it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.processes import wait_until_gone

START_SECONDS = 90.0


class Webserver:
    """A running webserver with daemon."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], home: Path) -> None:
        self.url = url
        self.process = process
        self.home = home

    def graphql(self, query: str, **variables: Any) -> Any:
        answer = httpx.post(
            f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=60
        ).json()
        assert "errors" not in answer, answer
        return answer["data"]

    def run_status(self, run_id: str) -> str:
        query = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        return str(self.graphql(query, id=run_id)["runOrError"].get("status"))

    def wait_for_status(self, run_id: str, *wanted: str, seconds: float = 90) -> str:
        deadline = time.monotonic() + seconds
        status = ""
        while time.monotonic() < deadline:
            status = self.run_status(run_id)
            if status in wanted:
                return status
            time.sleep(0.2)
        msg = f"run {run_id} is {status}, not {wanted}; {self.failures(run_id)}"
        raise AssertionError(msg)

    def events(self, run_id: str) -> Any:
        """All events of a run, as the UI shows them."""
        query = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
            __typename ... on MessageEvent { message level stepKey }
            ... on ExecutionStepFailureEvent { error { message stack
              causes { message stack } } } } } } }"""
        return self.graphql(query, id=run_id)["logsForRun"]["events"]

    def failures(self, run_id: str) -> list[str]:
        query = """query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
            ... on MessageEvent { message level }
            ... on ExecutionStepFailureEvent { error { message } } } } } }"""
        events = self.graphql(query, id=run_id)["logsForRun"]["events"]
        return [
            (event.get("error") or event)["message"]
            for event in events
            if event.get("level") in ("ERROR", "CRITICAL")
        ]


@contextlib.contextmanager
def running_webserver(home: Path, folder: Path, **environ: str) -> Generator[Webserver]:
    """`dagster dev` as `sandbox-pipeline ui` starts it, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "webserver.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "sandbox_pipeline", "ui", "--port", str(port)],
        cwd=folder,
        env={**os.environ, "DAGSTER_HOME": str(home), **environ},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    server = Webserver(f"http://127.0.0.1:{port}", process, home)
    try:
        _wait_until_ready(server, folder / "webserver.log")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


@contextlib.contextmanager
def deployed_webserver(folder: Path, orchestrations: Mapping[str, str]) -> Generator[Webserver]:
    """A webserver on a deployment of its own, which may leave no sandbox alive.

    Args:
        folder: for the deployment; exists.
        orchestrations: file name to content.
    """
    named = folder / "orchestrations"
    named.mkdir()
    for name, content in orchestrations.items():
        (named / name).write_text(content, encoding="utf-8")
    home = folder / "home"
    with running_webserver(home, folder) as running:
        yield running
    assert wait_until_gone(home, 10) == []


def _wait_until_ready(server: Webserver, log: Path) -> None:
    query = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            if server.graphql(query)["repositoriesOrError"]["nodes"]:
                return
        if server.process.poll() is not None:
            break
        time.sleep(0.3)
    msg = f"no webserver: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}"
    raise AssertionError(msg)
