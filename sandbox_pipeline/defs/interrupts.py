"""An interrupt cancels the work of an op, wherever the op runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Generator

from sandbox_pipeline.ownership import WORKER_VARIABLE


@contextlib.contextmanager
def interruptible() -> Generator[None]:
    """Let the first SIGINT or SIGTERM cancel the running task, while the block runs.

    In the process of a step (the multiprocess executor's, say) Dagster's handler raises an
    exception at whatever line is being executed. If that is a callback of the event loop, asyncio
    logs the exception and goes on: the interrupt is lost, and with it what the callback was to
    wake up, so that the step may wait for ever. In the run's own worker the executor sees to
    interrupts itself, for all ops together, and nothing is done here.
    """
    in_worker = os.environ.get(WORKER_VARIABLE) == str(os.getpid())
    if in_worker or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    asked = False

    def cancel() -> None:
        # Once: a terminal's Ctrl-C reaches this process by itself too, and a second cancellation
        # would break off the clean-up that the first one began.
        nonlocal asked
        if task is not None and not asked:
            asked = True
            task.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
