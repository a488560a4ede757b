"""`python -m tests.servers.e2b_server.front`: the part of the cloud that may be killed.

Carries connections to the server that holds sandboxes and ledger. While it is dead, connections
are refused and answers that were under way are lost, as when a cloud's API is down; the sandboxes
live on. After each death it comes back on the same port.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path


async def carry(listener: socket.socket, port: int) -> None:
    """Carry every connection on to a port of this machine."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_copy(reader, back), _copy(onward, writer))

    server = await asyncio.start_server(connected, sock=listener)
    await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # one end is gone; so is the other now
    finally:
        writer.close()


def keep(port: int, pid_file: Path, most_seconds: float, seed: int) -> None:
    """Start it, and again after each of its deaths, until SIGTERM; never returns.

    Args:
        port: of the server behind it.
        pid_file: gets the process to kill.
        most_seconds: longest time that it stays dead.
        seed: of how long it stays dead each time.
    """
    chance = random.Random(seed)  # noqa: S311 - repeatable
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    sys.stdout.write(f"http://127.0.0.1:{address[1]}\n")
    sys.stdout.flush()
    while True:
        child = os.fork()
        if child == 0:
            # Bound only here: while it is dead, nobody listens.
            asyncio.run(carry(socket.create_server(address, backlog=512), port))
        signal.signal(signal.SIGTERM, functools.partial(_end, child))
        pid_file.write_text(str(child), encoding="ascii")
        os.waitpid(child, 0)
        time.sleep(chance.random() * most_seconds)


def _end(child: int, _number: int, _frame: object) -> None:
    os.kill(child, signal.SIGKILL)
    sys.exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.servers.e2b_server.front", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="of the server behind it")
    parser.add_argument("--pid-file", type=Path, required=True)
    parser.add_argument("--most-seconds", type=float, default=1.0, help="that it stays dead")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    keep(given.port, given.pid_file, given.most_seconds, given.seed)
