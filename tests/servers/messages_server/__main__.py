"""`python -m tests.servers.messages_server [port]`: a server that writes one file, then is done."""

from __future__ import annotations

import asyncio
import sys

from tests.servers.messages_server.script import ToolCall, say, steps
from tests.servers.messages_server.server import MessagesServer


async def main() -> None:
    """Serve until interrupted; print the URL, then each request."""
    command = "echo 'hello from the model' > hello.txt"
    names = ("bash", "Bash")

    def write(name: str) -> ToolCall:
        return ToolCall(name, {"command": command})

    sdk, cli = (steps(say("writing", write(name)), say("done")) for name in names)
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    server = MessagesServer(port=port)
    server.script = lambda ask: (
        cli if any(tool.get("name") == "Bash" for tool in ask.body.get("tools", [])) else sdk
    )(ask)
    async with server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        seen = 0
        while True:
            for entry in server.ledger[seen:]:
                sys.stdout.write(f"{entry.method} {entry.path} {entry.status} {entry.charge}\n")
            sys.stdout.flush()
            seen = len(server.ledger)
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(main())
