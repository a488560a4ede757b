"""What all stages of all forks in one process share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sandbox_pipeline import plugins
from sandbox_pipeline.agents.base import Agent
from sandbox_pipeline.orders import Orders
from sandbox_pipeline.records import Event, ForkRef, Orchestration
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.base import ProviderHost, Sandbox, SandboxProvider
from sandbox_pipeline.settings import Settings
from sandbox_pipeline.store import Store

APP = "sandbox_pipeline"

Announce = Callable[[Event], None]
"""Shows an event where people watch, such as the log of the Dagster run."""


def silent(event: Event) -> None:
    """Shows nothing."""


class Runtime:
    """Store, providers, agents and slots of one process; belongs to one event loop.

    Args:
        store: open; closed with this.
        settings: of the deployment.
        environ: of this process; secrets are taken from it by name.
        providers: made already, by name; others are made when first asked for.
        agents: likewise, by kind.

    Attributes:
        workflow_id: what the run is of that this was opened for, once that is known.
        permits: held by who is first in line for the rate limit.
        connected: by sandbox id, those whose connection the stages of a fork hand on.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        environ: Mapping[str, str],
        *,
        providers: Mapping[str, SandboxProvider] | None = None,
        agents: Mapping[str, Agent] | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self.environ = environ
        self.workflow_id: str | None = None
        self.slots = Slots()
        self.permits = asyncio.Lock()
        self.orders = Orders(store)
        self.connected: dict[str, Sandbox] = {}
        self._providers = dict(providers or {})
        self._agents = dict(agents or {})
        self._deployment_id: str | None = None

    @classmethod
    def open(cls, *, home: Path | None = None, environ: Mapping[str, str] | None = None) -> Runtime:
        """A runtime as the environment describes it.

        Raises:
            ConfigError: a variable is unusable.
            StoreError: the database is.
        """
        environ = os.environ if environ is None else environ
        settings = Settings.from_environ(environ, home=home)
        return cls(Store.open(settings.db_url), settings, environ)

    async def close(self) -> None:
        """Let go of connections; sandboxes live on."""
        for provider in self._providers.values():
            await provider.close()
        await self.store.close()

    async def deployment_id(self) -> str:
        """What tells this deployment's sandboxes from those of others with the same account."""
        if self._deployment_id is None:
            self._deployment_id = await self.store.deployment_id()
        return self._deployment_id

    def provider(self, name: str) -> SandboxProvider:
        """A provider by name.

        Raises:
            ConfigError: there is none, or it lacks its key.
        """
        if name not in self._providers:
            host = ProviderHost(self.settings.home, self.environ)
            self._providers[name] = plugins.load_provider(name, host)
        return self._providers[name]

    def agent(self, kind: str) -> Agent:
        """An agent by kind.

        Raises:
            ConfigError: there is none.
        """
        if kind not in self._agents:
            self._agents[kind] = plugins.load_agent(kind)
        return self._agents[kind]

    def redactor(self, orchestration: Orchestration) -> Redactor:
        """Knows every secret that this orchestration could come across."""
        return Redactor.from_environ(self.environ, orchestration.config.agent.env_from)


class Slots:
    """Lets forks wait in this process, in turn, for `max_concurrent`; the store has the truth.

    Without it every waiting fork would ask the store again and again. Across processes only
    the few that were let through here compete there.
    """

    def __init__(self) -> None:
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._held: set[ForkRef] = set()

    async def take(self, ref: ForkRef, limit: int) -> None:
        """Wait for a slot; at once where the fork has one."""
        if ref in self._held:
            return
        gate = self._gates.setdefault(ref.workflow_id, asyncio.Semaphore(limit))
        await gate.acquire()
        self._held.add(ref)

    def give_back(self, ref: ForkRef) -> None:
        """Let the next fork in; nothing where this one has no slot."""
        if ref in self._held:
            self._held.discard(ref)
            self._gates[ref.workflow_id].release()
