"""The contract of an agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import AgentConfig
from sandbox_pipeline.records import AgentResult
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.base import Network, Sandbox

PROMPT_FILE = "prompt.txt"
EXCHANGE_DIR = "/run/exchange"
"""Where `Task.exchange_dir` is inside the sandbox."""


def job_of(attempt: int) -> str:
    """Name of the job that an agent's attempt is inside the sandbox."""
    return f"agent-{attempt}"


@dataclass(frozen=True)
class Task:
    """What one fork's agent has to do.

    Attributes:
        prompt_path: of the prompt inside the sandbox, byte for byte what the person typed.
        artifacts: folder on this machine for transcript and logs of this fork; exists.
        environ: this machine's environment, for keys by name and `env_from`.
        attempt: 1-based; a new attempt is a new run of the agent in a fresh sandbox.
        exchange_dir: folder on this machine, of this sandbox alone, that is at `EXCHANGE_DIR`
            inside; None where the provider has no mounts. The sandbox may have written there.
        network: what the sandbox may reach.
        key_injected: the provider puts the agent's `ModelApi.headers` on the sandbox's requests.
    """

    workflow_id: str
    fork_num: int
    attempt: int
    prompt: str
    prompt_path: str
    model: str
    config: AgentConfig
    artifacts: Path
    environ: Mapping[str, str]
    redactor: Redactor
    exchange_dir: Path | None = None
    network: Network = "none"
    key_injected: bool = False


@dataclass(frozen=True)
class ModelApi:
    """What an agent inside a sandbox talks to.

    Attributes:
        headers: of each request; they hold the key.
    """

    host: str
    headers: Mapping[str, str] = field(repr=False)


class Reporter(Protocol):
    """Hears how an agent is doing."""

    async def progress(self, text: str, *, cost_usd: float | None = None) -> None:
        """One short line for the live display, such as `turn 4, Edit`; called often."""
        ...

    async def event(self, name: str, payload: Mapping[str, Any]) -> None:
        """Something worth keeping in the timeline; called seldom."""
        ...


class Agent(Protocol):
    """Runs prompts. Instances are made without arguments and hold no state of a fork."""

    kind: str
    """As in `agent.kind`."""
    network: Network
    """The least network that it needs; what `sandbox.network: auto` becomes."""

    def validate(self, config: AgentConfig, environ: Mapping[str, str], *, provider: str) -> None:
        """Check what can be known before anything is created.

        Raises:
            ConfigError: naming the field or the variable and the remedy.
        """
        ...

    def mounts(self, config: AgentConfig, environ: Mapping[str, str]) -> Mapping[str, str]:
        """Host path to path inside, read-only, of what the agent needs in a local sandbox."""
        ...

    async def run(self, sandbox: Sandbox, task: Task, reporter: Reporter) -> AgentResult:
        """Start the agent, or go on following it if it already runs, to its end.

        Called again for the same sandbox and attempt after a crash, and must then not run the
        prompt a second time. A failing agent is a result. Writes `transcript.jsonl` and the raw
        output to `task.artifacts`, redacted.

        Raises:
            AgentError: the agent's answer can't be read.
            ProviderError: the sandbox failed.
        """
        ...


@runtime_checkable
class UsesModelApi(Protocol):
    """An agent that needs a model's key inside the sandbox, unless it is injected; optional."""

    def model_api(self, environ: Mapping[str, str]) -> ModelApi:
        """What to let through, and which headers to put on it.

        Raises:
            ConfigError: the environment has no key.
        """
        ...


@runtime_checkable
class SelfCheckingAgent(Protocol):
    """An agent that can say whether it would work here; optional."""

    async def diagnose(
        self, config: AgentConfig, model: str, environ: Mapping[str, str], *, provider: str
    ) -> Sequence[Check]:
        """What `doctor` shows of it; never raises for what it finds."""
        ...
