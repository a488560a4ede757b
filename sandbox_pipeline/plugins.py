"""Finds providers and agents by name, those of other packages included.

A provider is an entry point of the group `sandbox_pipeline.providers`: a callable that takes a
`ProviderHost`. An agent is one of the group `sandbox_pipeline.agents`: a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points

from sandbox_pipeline.agents.base import Agent
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.sandboxes.base import Network, ProviderHost, SandboxProvider

PROVIDERS = "sandbox_pipeline.providers"
AGENTS = "sandbox_pipeline.agents"


def names(group: str) -> list[str]:
    """What is installed in a group."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_provider(name: str, host: ProviderHost) -> SandboxProvider:
    """Make a provider.

    Raises:
        ConfigError: none has this name, or its configuration is missing.
    """
    factory: Callable[[ProviderHost], SandboxProvider] = _find(
        PROVIDERS, name, "sandbox.provider"
    ).load()
    return factory(host)


def load_agent(kind: str) -> Agent:
    """Make an agent.

    Raises:
        ConfigError: none has this name.
    """
    return _find(AGENTS, kind, "agent.kind").load()()


def resolve_provider(config: OrchestrationConfig, environ: Mapping[str, str]) -> str:
    """The provider that `auto` stands for, else the one that is named."""
    wanted = config.sandbox.provider
    if wanted != "auto":
        return wanted
    return "e2b" if environ.get("E2B_API_KEY") and "e2b" in names(PROVIDERS) else "local"


def resolve_network(config: OrchestrationConfig, agent: Agent) -> Network:
    """The network that `auto` stands for, else the one that is named."""
    wanted = config.sandbox.network
    return agent.network if wanted == "auto" else wanted


def _find(group: str, name: str, field: str) -> EntryPoint:
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        msg = f"{field}: {name!r} is not installed; there are: {', '.join(sorted(found))}"
        raise ConfigError(msg)
    return found[name]
