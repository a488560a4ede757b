"""Sandboxes at E2B (https://e2b.dev), through its SDK."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import SandboxConfig
from sandbox_pipeline.errors import ConfigError, ErrorKind, ProviderError
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.base import (
    HOME,
    STATE_DIR,
    WORKSPACE,
    Command,
    PlanLimits,
    Sandbox,
    SandboxInfo,
    SandboxSpec,
)
from sandbox_pipeline.sandboxes.e2b_client import KEY_HELP, E2BClient
from sandbox_pipeline.sandboxes.e2b_errors import MAX_MESSAGE_CHARS, Call
from sandbox_pipeline.sandboxes.e2b_prices import SandboxPrices, prices_from_environ
from sandbox_pipeline.sandboxes.e2b_sandbox import E2BSandbox

DEFAULT_TEMPLATE = "claude"
PAGE_SIZE = 100
MAX_PAGES = 1000
CONNECT_TTL_SECONDS = 15
READY_SECONDS = 30.0
READY_POLL_SECONDS = 0.25
CONNECTION_HELP = "check the network, a proxy, E2B_DOMAIN and E2B_API_URL; try again later"
TEMPLATE_HELP = "change sandbox.template, or build it: https://e2b.dev/docs/template"

_FOLDERS = Command(["mkdir", "-p", WORKSPACE, STATE_DIR], timeout_seconds=READY_SECONDS)


class E2BProvider:
    """Makes, finds and ends sandboxes at E2B.

    CPU, memory and disk of a sandbox are its template's; `sandbox.cpu` and the like don't apply.

    Args:
        api_key: value of the key.
        domain, api_url, sandbox_url: where E2B is; None for the SDK's own defaults.
        redactor: takes secrets out of error messages; by default the key only.
        request_timeout_seconds: longest wait for an answer of the API.
        prices: of a running sandbox; by default the built-in ones.
    """

    def __init__(
        self,
        api_key: str,
        *,
        domain: str | None = None,
        api_url: str | None = None,
        sandbox_url: str | None = None,
        redactor: Redactor | None = None,
        request_timeout_seconds: float = 60.0,
        prices: SandboxPrices | None = None,
    ) -> None:
        self._client = E2BClient(
            api_key,
            domain=domain,
            api_url=api_url,
            sandbox_url=sandbox_url,
            redactor=redactor,
            timeout_seconds=request_timeout_seconds,
            prices=prices,
        )
        self._options = self._client.options

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> E2BProvider:
        """As the SDK's own variables say.

        Raises:
            ConfigError: `E2B_API_KEY` is missing or malformed, the prices are malformed, or
                `E2B_DEBUG` is set.
        """
        debug = environ.get("E2B_DEBUG", "")
        if debug.strip().lower() not in ("", "0", "false"):
            msg = "E2B_DEBUG is set, which makes the SDK pretend to create and kill; unset it"
            raise ConfigError(msg)
        return cls(
            environ.get("E2B_API_KEY", ""),
            domain=environ.get("E2B_DOMAIN") or None,
            api_url=environ.get("E2B_API_URL") or None,
            sandbox_url=environ.get("E2B_SANDBOX_URL") or None,
            redactor=Redactor.from_environ(environ),
            prices=prices_from_environ(environ),
        )

    def __repr__(self) -> str:
        return f"E2BProvider(api_url={self._options['api_url']!r})"

    @property
    def name(self) -> str:
        """As in `sandbox.provider`."""
        return "e2b"

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Create one sandbox and wait until it takes commands."""
        from e2b import AsyncSandbox

        began = time.monotonic()
        sdk = await self._client.ask(
            AsyncSandbox.create(
                template=spec.base or spec.config.template or DEFAULT_TEMPLATE,
                timeout=math.ceil(spec.ttl_seconds),
                metadata=dict(spec.metadata),
                lifecycle={"on_timeout": "kill"},
                idempotency_key=spec.idempotency_key or spec.lease_id,
                **_network_options(spec),
                **self._options,
            ),
            Call.CREATE,
            "create a sandbox",
        )
        if spec.on_answer is not None:
            await spec.on_answer()
        sandbox = E2BSandbox(self._client, sdk, until=began + spec.ttl_seconds)
        await self._make_ready(sandbox)
        return sandbox

    async def _make_ready(self, sandbox: E2BSandbox) -> None:
        """Make the folders of the contract, which shows that it takes commands."""
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                made = await sandbox.run(_FOLDERS)
            except ProviderError as error:
                problem, final = str(error), not error.policy.retry
            else:
                if made.exit_code == 0:
                    return
                problem = f"no folders in {HOME}: {made.stderr[:200].decode('utf-8', 'replace')}"
                final = True
            if final or time.monotonic() > end:
                # It exists, so whoever asked has to find and end it.
                msg = f"sandbox {sandbox.sandbox_id} was created but can't be used: {problem}"
                raise ProviderError(ErrorKind.AMBIGUOUS, msg[:MAX_MESSAGE_CHARS])
            await asyncio.sleep(READY_POLL_SECONDS)

    async def connect(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox that runs; a paused one is not woken up."""
        from e2b import AsyncSandbox

        doing = "connect to a sandbox"
        info = await self._client.info(sandbox_id, doing)
        if info.state.value != "running":
            msg = f"sandbox {sandbox_id} is {info.state.value}"
            raise ProviderError(ErrorKind.GONE, msg)
        # E2B never shortens a running sandbox's life on this call; should it be paused right now
        # after all, then it is woken up for this long only.
        sdk = await self._client.ask(
            AsyncSandbox.connect(sandbox_id, timeout=CONNECT_TTL_SECONDS, **self._options),
            Call.SANDBOX,
            doing,
        )
        left = info.end_at.timestamp() - time.time()
        sandbox = E2BSandbox(self._client, sdk, until=time.monotonic() + left)
        # Whoever created it may not have come to that; if it fails, so will the caller's commands.
        await sandbox.run(_FOLDERS)
        return sandbox

    async def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        """All that exist and have these metadata, over all pages, paused ones included."""
        from e2b import AsyncSandbox, SandboxQuery

        pages = AsyncSandbox.list(
            query=SandboxQuery(metadata=dict(metadata)), limit=PAGE_SIZE, **self._options
        )
        found: dict[str, SandboxInfo] = {}
        for _ in range(MAX_PAGES):
            for info in await self._client.ask(pages.next_items(), Call.ACCOUNT, "list sandboxes"):
                # Whether the server's filter can be trusted is not known: what is found is killed.
                if all(info.metadata.get(key) == value for key, value in metadata.items()):
                    found[info.sandbox_id] = SandboxInfo(
                        info.sandbox_id,
                        info.metadata,
                        started_at=info.started_at.timestamp(),
                        expires_at=info.end_at.timestamp(),
                    )
            if not pages.has_next:
                return list(found.values())
        msg = f"E2B's list of sandboxes has no end after {MAX_PAGES} pages"
        raise ProviderError(ErrorKind.UNAVAILABLE, msg)

    async def kill(self, sandbox_id: str) -> bool:
        """End it; False if it was gone already."""
        from e2b import AsyncSandbox

        return await self._client.ask(
            AsyncSandbox.kill(sandbox_id, **self._options), Call.ACCOUNT, "kill a sandbox"
        )

    async def snapshot(self, sandbox: Sandbox) -> str:
        """Keep its files and memory as a template for others, then end it.

        The template stays in the account until `discard`.
        """
        from e2b import AsyncSandbox

        sandbox_id = sandbox.sandbox_id
        made = AsyncSandbox.create_snapshot(sandbox_id, **self._options)
        try:
            info = await self._client.ask(made, Call.SANDBOX, "snapshot a sandbox")
        except ProviderError as error:
            if error.kind is ErrorKind.GONE and not await self._client.is_gone(sandbox_id):
                msg = "this E2B server has no snapshots"
                raise ProviderError(ErrorKind.INVALID, msg) from error
            raise
        await self.kill(sandbox_id)
        return info.snapshot_id

    async def discard(self, base: str) -> None:
        """Delete the template that `snapshot` made; nothing where there is none."""
        from e2b import AsyncSandbox

        deleted = AsyncSandbox.delete_snapshot(base, **self._options)
        await self._client.ask(deleted, Call.ACCOUNT, "delete a snapshot")

    async def snapshots_of(self, sandbox_id: str) -> Sequence[str]:
        """The templates that `snapshot` made of a sandbox, over all pages."""
        from e2b import AsyncSandbox

        pages = AsyncSandbox.list_snapshots(sandbox_id=sandbox_id, limit=PAGE_SIZE, **self._options)
        found: list[str] = []
        for _ in range(MAX_PAGES):
            page = await self._client.ask(pages.next_items(), Call.ACCOUNT, "list snapshots")
            found += [info.snapshot_id for info in page]
            if not pages.has_next:
                break
        return found

    async def injects(self, sandbox_id: str, host: str) -> bool:
        """Whether E2B says that it has rules for this host; an older server drops them."""
        info = await self._client.info(sandbox_id, "look at a sandbox's network")
        rules: Mapping[str, Any] = (info.network or {}).get("rules") or {}
        return host in rules

    @property
    def smallest_plan(self) -> PlanLimits:
        """E2B's free one, see https://e2b.dev/pricing."""
        return PlanLimits("E2B's free plan", concurrent=20, creates_per_second=1, life_seconds=3600)

    async def diagnose(self, config: SandboxConfig) -> Sequence[Check]:
        """Whether the key is accepted and the template exists; creates nothing."""
        from e2b import AsyncSandbox, AsyncTemplate

        page = AsyncSandbox.list(limit=1, **self._options)
        try:
            await self._client.ask(page.next_items(), Call.ACCOUNT, "list sandboxes")
        except ProviderError as error:
            remedy = KEY_HELP if error.kind is ErrorKind.AUTH else CONNECTION_HELP
            return [Check("E2B_API_KEY", "failed", str(error), remedy)]
        accepted = Check("E2B_API_KEY", "ok", "accepted")
        name = config.template or DEFAULT_TEMPLATE
        which = f"E2B template {name!r}"
        try:
            exists = await self._client.ask(
                AsyncTemplate.exists(name, **self._options), Call.ACCOUNT, "look up a template"
            )
        except ProviderError as error:
            return [accepted, Check(which, "warning", str(error), TEMPLATE_HELP)]
        if exists:
            return [accepted, Check(which, "ok", "exists")]
        return [accepted, Check(which, "failed", "not found", TEMPLATE_HELP)]

    async def close(self) -> None:
        """Nothing: the SDK's connections belong to the process."""


def _network_options(spec: SandboxSpec) -> dict[str, Any]:
    from e2b import ALL_TRAFFIC

    # Nobody outside needs the sandbox's ports; E2B's own access doesn't go by this setting.
    closed: dict[str, Any] = {"allow_public_traffic": False}
    if spec.network == "none":
        return {"allow_internet_access": False, "network": closed}
    if spec.model_headers:
        transform = {"transform": {"headers": dict(spec.model_headers)}}
        closed["rules"] = {spec.model_host: [transform]}
    if spec.network == "model_api":
        only = {"allow_out": [spec.model_host], "deny_out": [ALL_TRAFFIC]}
        return {"network": closed | only}
    return {"allow_internet_access": True, "network": closed}
