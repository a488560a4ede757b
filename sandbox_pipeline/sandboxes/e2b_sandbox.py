"""One sandbox at E2B."""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.sandboxes import e2b_command
from sandbox_pipeline.sandboxes.base import Command, CommandResult, Resources
from sandbox_pipeline.sandboxes.e2b_client import E2BClient
from sandbox_pipeline.sandboxes.e2b_errors import Call

if TYPE_CHECKING:
    import e2b

COMMAND_MARGIN_SECONDS = 30.0
"""Beyond a command's own deadline, which is kept inside the sandbox."""
MISSING_FILE = 44
T = TypeVar("T")

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
            await self._ask(self._upload(path, data), "hand over a command")
        seconds = command.timeout_seconds + COMMAND_MARGIN_SECONDS
        answer = await self._ask(
            self._sdk.commands.run(
                e2b_command.LAUNCH,
                envs={e2b_command.JOB_VARIABLE: job.variable},
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
        await self._ask(self._upload(partial, data), "write a file")
        await self._ask(self._sdk.files.rename(partial, path), "write a file")

    async def extend(self, ttl_seconds: float) -> None:
        """Let it live for at least this long from now."""
        now = time.monotonic()
        # E2B would shorten too, and tells the end by its own clock only, so what is known of the
        # remaining life decides; without such knowledge the wanted life is the safe one.
        seconds = math.ceil(max(ttl_seconds, self._until - now))
        await self._ask(self._sdk.set_timeout(seconds), "extend a sandbox's life")
        self._until = max(self._until, now + seconds)

    async def resources(self) -> Resources:
        """Estimated from E2B's samples; the disk's figure includes the template."""
        samples = await self._ask(self._sdk.get_metrics(), "tell what a sandbox used")
        if not samples:
            return Resources()
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
        )

    async def _upload(self, path: str, data: bytes) -> None:
        await self._sdk.files.write(path, data, use_octet_stream=True)

    async def _ask(self, call: Awaitable[T], doing: str, *, seconds: float | None = None) -> T:
        try:
            return await self._client.ask(call, Call.SANDBOX, doing, seconds=seconds)
        except ProviderError as error:
            failure = error
        if failure.kind is ErrorKind.UNAVAILABLE and await self._client.is_gone(self.sandbox_id):
            raise ProviderError(ErrorKind.GONE, f"sandbox {self.sandbox_id} is gone: {failure}")
        raise failure
