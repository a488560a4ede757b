"""A folder that a local sandbox shares with this machine, for sockets to the host.

The key proxy listens there. It is mounted read-only, which connecting doesn't mind, and its name
follows from the lease: a resumed run finds it again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sandbox_pipeline.agents.base import Agent
from sandbox_pipeline.records import Orchestration


def has_exchange(orchestration: Orchestration, agent: Agent) -> bool:
    """Whether each of its sandboxes shares a folder."""
    isolated = orchestration.config.sandbox.isolation != "none"
    return orchestration.provider == "local" and isolated and agent.network == "model_api"


def exchange_folder(home: Path, lease_id: str) -> Path:
    """The folder of one sandbox, made if missing."""
    folder = _place(home, lease_id)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def remove_exchange_folder(home: Path, lease_id: str) -> None:
    """Remove it, if there was one."""
    shutil.rmtree(_place(home, lease_id), ignore_errors=True)


def _place(home: Path, lease_id: str) -> Path:
    return home / "exchange" / lease_id
