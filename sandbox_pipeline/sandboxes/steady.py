"""A sandbox over an unsteady connection: what is safe to repeat is repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandbox_pipeline.config import RetryConfig
from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.retrying import patiently
from sandbox_pipeline.sandboxes.base import Command, CommandResult, Resources, Sandbox

T = TypeVar("T")

MORE_ATTEMPTS = 3


class SteadySandbox:
    """Wraps a sandbox; an agent must not fail because one read of its output did.

    Reads, writes and extensions are repeated with `MORE_ATTEMPTS` times the configured
    attempts. So is a command that is `repeatable`; another one only where the provider says that
    it was never started.
    """

    def __init__(self, sandbox: Sandbox, retry: RetryConfig) -> None:
        self._sandbox = sandbox
        self._retry = retry.model_copy(update={"attempts": retry.attempts * MORE_ATTEMPTS})

    @property
    def sandbox_id(self) -> str:
        """See `Sandbox.sandbox_id`."""
        return self._sandbox.sandbox_id

    async def run(self, command: Command) -> CommandResult:
        """See `Sandbox.run`."""
        if command.repeatable:
            return await self._patiently(lambda: self._sandbox.run(command))

        def never_started(error: ProviderError) -> bool:
            return error.kind in (ErrorKind.UNAVAILABLE, ErrorKind.RATE_LIMITED)

        return await patiently(
            self._retry, lambda: self._sandbox.run(command), repeatable=never_started
        )

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        """See `Sandbox.read`."""
        return await self._patiently(
            lambda: self._sandbox.read(path, offset=offset, max_bytes=max_bytes)
        )

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`."""
        await self._patiently(lambda: self._sandbox.write(path, data))

    async def extend(self, ttl_seconds: float) -> None:
        """See `Sandbox.extend`."""
        await self._patiently(lambda: self._sandbox.extend(ttl_seconds))

    async def resources(self) -> Resources:
        """See `Sandbox.resources`."""
        return await self._patiently(self._sandbox.resources)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        return await patiently(
            self._retry, call, repeatable=lambda error: error.kind is not ErrorKind.GONE
        )
