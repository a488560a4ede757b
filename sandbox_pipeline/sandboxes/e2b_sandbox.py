"""One sandbox at E2B."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.sandboxes import e2b_command
from sandbox_pipeline.sandboxes.base import Command, CommandResult, Resources
from sandbox_pipeline.sandboxes.e2b_client import E2BClient
from sandbox_pipeline.sandboxes.e2b_errors import MAX_MESSAGE_CHARS, Call

if TYPE_CHECKING:
    import e2b

COMMAND_MARGIN_SECONDS = 30.0
"""Beyond a command's own deadline, which is kept inside the sandbox."""
SLOWEST_BYTES_PER_SECOND = 250_000
"""Data that moves slower than this counts as stuck."""
USER = "user"
"""Whose home is the contract's; a template may have another user by default."""
MISSING_FILE = 44
T = TypeVar("T")
logger = logging.getLogger(__name__)

_READ = (
    f'[ -f "$1" ] || exit {MISSING_FILE}; '
    'exec dd if="$1" bs=65536 skip="$2" count="$3" iflag=skip_bytes,count_bytes status=none'
)


class E2BSandbox:
    """One sandbox at E2B.

    Args:
        client: of its provider.
        sdk: the SDK's object.
        until: monotonic time until which it lives as far as known.
    """

    def __init__(self, client: E2BClient, sdk: e2b.AsyncSandbox, *, until: float) -> None:
        self._client = client
        self._sdk = sdk
        self._until = until

    @property
    def sandbox_id(self) -> str:
        """E2B's name of it."""
        return self._sdk.sandbox_id

    async def run(self, command: Command) -> CommandResult:
        """Run a short command to its end; its deadline is kept inside the sandbox."""
        try:
            job = e2b_command.prepare(command)
        except ValueError as error:
            message = f"sandbox: {error}\n".encode()
            return CommandResult(e2b_command.NOT_EXECUTABLE, b"", message)
        for path, data in job.uploads.items():
            await self._upload(path, data, "hand over a command")
        seconds = command.timeout_seconds + COMMAND_MARGIN_SECONDS
        seconds += 2 * command.max_output_bytes / SLOWEST_BYTES_PER_SECOND
        answer = await self._ask(
            self._sdk.commands.run(
                e2b_command.LAUNCH,
                envs={e2b_command.JOB_VARIABLE: job.variable},
                user=USER,
                cwd="/",
                timeout=seconds,
            ),
            "run a command",
            seconds=seconds,
        )
        try:
            return e2b_command.result(job, answer.stdout)
        except e2b_command.UnreadableAnswerError as error:
            raise ProviderError(ErrorKind.UNAVAILABLE, str(error)) from error

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        """Part of a file. The SDK reads whole files only, so a command cuts it out.

        Raises:
            FileNotFoundError: there is no such file, or it is a folder, pipe or device.
        """
        if max_bytes <= 0:
            return b""
        argv = ["sh", "-c", _READ, "read", path, str(offset), str(max_bytes)]
        answer = await self.run(Command(argv, cwd="/", max_output_bytes=max_bytes))
        if answer.exit_code == MISSING_FILE:
            raise FileNotFoundError(path)
        if answer.exit_code != 0:
            reason = answer.stderr[:200].decode("utf-8", "replace").strip()
            msg = f"{path} can't be read in the sandbox: exit {answer.exit_code}: {reason}"
            raise ProviderError(ErrorKind.UNAVAILABLE, msg)
        return answer.stdout

    async def write(self, path: str, data: bytes) -> None:
        """Write a whole file under another name, then rename it."""
        partial = f"{path}.{secrets.token_hex(8)}.partial"
        await self._upload(partial, data, "write a file")
        await self._ask(self._sdk.files.rename(partial, path, user=USER), "write a file")

    async def extend(self, ttl_seconds: float) -> None:
        """Let it live for at least this long from now."""
        now = time.monotonic()
        # E2B would shorten too, and tells the end by its own clock only: the longer of the wanted
        # life and of what is known of the present one is asked for, never nothing.
        wanted = math.ceil(ttl_seconds)
        seconds = max(wanted, math.ceil(self._until - now))
        doing = "extend a sandbox's life"
        try:
            await self._ask(self._sdk.set_timeout(seconds), doing)
        except ProviderError as error:
            if error.kind is not ErrorKind.INVALID or seconds == wanted:
                raise
            # What was thought of its life is more than the account may have: clocks differ.
            seconds = wanted
            await self._ask(self._sdk.set_timeout(seconds), doing)
        self._until = now + seconds

    async def resources(self) -> Resources:
        """Estimated from E2B's samples; the disk's figure includes the template."""
        doing = "tell what a sandbox used"
        info = await self._client.info(self.sandbox_id, doing)
        price = self._client.prices.usd_per_second(
            cpu_count=info.cpu_count, memory_mib=info.memory_mb
        )
        try:
            samples = await self._ask(self._sdk.get_metrics(), doing)
        except ProviderError as error:
            # Asked once: the sandbox is paid for while it is asked again, and has no more to do.
            logger.warning("sandbox %s: CPU and memory stay unknown: %s", self.sandbox_id, error)
            samples = []
        if not samples:
            return Resources(usd_per_second=price)
        cpu_seconds = sum(
            after.cpu_used_pct
            / 100
            * after.cpu_count
            * (after.timestamp - before.timestamp).total_seconds()
            for before, after in itertools.pairwise(samples)
        )
        return Resources(
            cpu_seconds=cpu_seconds if len(samples) > 1 else None,
            peak_memory_bytes=max(sample.mem_used for sample in samples),
            disk_bytes=samples[-1].disk_used,
            usd_per_second=price,
        )

    async def _upload(self, path: str, data: bytes, doing: str) -> None:
        seconds = self._client.timeout_seconds + len(data) / SLOWEST_BYTES_PER_SECOND
        upload = self._sdk.files.write(
            path, data, user=USER, request_timeout=seconds, use_octet_stream=True
        )
        await self._ask(upload, doing, seconds=seconds)

    async def _ask(self, call: Awaitable[T], doing: str, *, seconds: float | None = None) -> T:
        try:
            return await self._client.ask(call, Call.SANDBOX, doing, seconds=seconds)
        except ProviderError as error:
            failure = error
        if failure.kind is ErrorKind.UNAVAILABLE and await self._client.is_gone(self.sandbox_id):
            msg = f"sandbox {self.sandbox_id} is gone: {failure}"
            raise ProviderError(ErrorKind.GONE, msg[:MAX_MESSAGE_CHARS])
        raise failure
