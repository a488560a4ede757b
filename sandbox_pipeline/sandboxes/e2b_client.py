"""The E2B SDK behind one door: its settings, time limits, and errors as `ProviderError`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from sandbox_pipeline.errors import ConfigError, ErrorKind, ProviderError
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.e2b_errors import Call, provider_error
from sandbox_pipeline.sandboxes.e2b_prices import SandboxPrices

if TYPE_CHECKING:
    import e2b

KEY_HELP = "create one at https://e2b.dev/dashboard?tab=keys"
T = TypeVar("T")


class E2BClient:
    """What every call of the SDK needs.

    Args:
        api_key: value of the key.
        domain, api_url, sandbox_url: where E2B is; None for the SDK's own defaults.
        redactor: takes secrets out of error messages; by default the key only.
        timeout_seconds: longest wait for an answer of the API.
        prices: of a running sandbox.

    Attributes:
        options: what each call of the SDK is given.

    Raises:
        ConfigError: the key is missing or malformed.
    """

    def __init__(
        self,
        api_key: str,
        *,
        domain: str | None,
        api_url: str | None,
        sandbox_url: str | None,
        redactor: Redactor | None,
        timeout_seconds: float,
        prices: SandboxPrices | None = None,
    ) -> None:
        _check_key(api_key)
        self.redactor = redactor or Redactor([api_key])
        self.timeout_seconds = timeout_seconds
        self.prices = prices or SandboxPrices()
        self.options: dict[str, Any] = {
            "api_key": api_key,
            "domain": domain,
            "api_url": api_url,
            "sandbox_url": sandbox_url,
            "debug": False,
            # Retries are decided by one table for all providers; the SDK's own would multiply.
            "retries": 0,
            "request_timeout": timeout_seconds,
        }

    def __repr__(self) -> str:
        return f"E2BClient(api_url={self.options['api_url']!r})"

    async def ask(
        self, call: Awaitable[T], about: Call, doing: str, *, seconds: float | None = None
    ) -> T:
        """Wait for a call of the SDK, for `seconds` where given.

        The SDK's own time-outs are not enough: its transport takes the sum of two of them.

        Raises:
            ProviderError: whatever the SDK raised; unchained, since its exceptions hold bodies of
                any size and content.
        """
        try:
            async with asyncio.timeout(self.timeout_seconds if seconds is None else seconds):
                return await call
        except Exception as error:  # noqa: BLE001 - the SDK raises from several bases
            failure = provider_error(error, about, doing, self.redactor)
        raise failure

    async def info(self, sandbox_id: str, doing: str) -> e2b.SandboxInfo:
        """What E2B says about a sandbox."""
        from e2b import AsyncSandbox

        call = AsyncSandbox.get_info(sandbox_id, **self.options)
        return await self.ask(call, Call.SANDBOX, doing)

    async def is_gone(self, sandbox_id: str) -> bool:
        """Whether E2B says that a sandbox no longer runs; False where it can't be asked."""
        try:
            info = await self.info(sandbox_id, "look at a sandbox")
        except ProviderError as error:
            return error.kind is ErrorKind.GONE
        return info.state.value != "running"


def _check_key(api_key: str) -> None:
    if not api_key:
        msg = f"E2B_API_KEY is not set: {KEY_HELP}"
        raise ConfigError(msg)
    if any(char.isspace() or not char.isprintable() or not char.isascii() for char in api_key):
        msg = f"E2B_API_KEY has characters no key has, such as a space or newline: {KEY_HELP}"
        raise ConfigError(msg)
