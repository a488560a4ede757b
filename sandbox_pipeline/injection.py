"""Whether a sandbox needs the model's key inside, or its provider adds it outside."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sandbox_pipeline.agents.base import Agent, UsesModelApi
from sandbox_pipeline.records import Orchestration
from sandbox_pipeline.retrying import patiently
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import Injecting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyPlace:
    """Where the key of an agent inside a sandbox is.

    Attributes:
        injected: the provider puts it on the sandbox's requests.
        warning: why it is inside, although that was not asked for; empty where it isn't.
    """

    injected: bool
    warning: str = ""


async def place_of_key(
    runtime: Runtime, orchestration: Orchestration, agent: Agent, sandbox_id: str
) -> KeyPlace:
    """Ask the provider, who is the truth: a server may have dropped what it was told.

    Raises:
        ProviderError: it can't be asked.
    """
    if not isinstance(agent, UsesModelApi) or orchestration.config.sandbox.key_injection == "never":
        return KeyPlace(injected=False)
    provider = runtime.provider(orchestration.provider)
    host = agent.model_api(runtime.environ).host
    injected = isinstance(provider, Injecting) and await patiently(
        orchestration.config.retry, lambda: provider.injects(sandbox_id, host)
    )
    if injected:
        return KeyPlace(injected=True)
    text = (
        f"provider {orchestration.provider!r} does not put the key on requests to {host}: the "
        "agent's process has it, and its own commands could read it"
    )
    logger.warning("sandbox %s: %s", sandbox_id, text)
    return KeyPlace(injected=False, warning=text)
