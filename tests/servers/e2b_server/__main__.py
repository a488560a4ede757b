"""`python -m tests.servers.e2b_server --port 3000`: prints the environment that points there."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from tests.servers.e2b_server.server import API_KEY, E2BServer
from tests.servers.e2b_server.world import Limits


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="tests.servers.e2b_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--api-key", default=API_KEY)
    parser.add_argument("--ledger", type=Path, help="JSONL file of all that happens")
    parser.add_argument("--creates-per-second", type=int)
    parser.add_argument("--concurrent", type=int)
    parser.add_argument("--page-size", type=int, default=100)
    parser.add_argument("--no-idempotency", action="store_true")
    arguments = parser.parse_args()
    limits = Limits(
        creates_per_second=arguments.creates_per_second,
        concurrent=arguments.concurrent,
        page_size=arguments.page_size,
        idempotency=not arguments.no_idempotency,
    )
    stop = threading.Event()

    def end(_number: int, _frame: object) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with E2BServer(
        port=arguments.port,
        api_key=arguments.api_key,
        limits=limits,
        ledger_path=arguments.ledger,
    ) as server:
        for name, value in server.environ.items():
            sys.stdout.write(f"{name}={value}\n")
        sys.stdout.flush()
        stop.wait()


if __name__ == "__main__":
    main()
