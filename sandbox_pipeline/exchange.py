"""A folder that a local sandbox shares with this machine, for sockets to the host.

The key proxy listens there. It is mounted read-only, which connecting doesn't mind, and its name
follows from the lease: a resumed run finds it again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sandbox_pipeline.agents.base import Agent
from sandbox_pipeline.records import Orchestration


def exchange_folder(
    home: Path, orchestration: Orchestration, agent: Agent, lease_id: str
) -> Path | None:
    """The folder of one sandbox, made if missing; None where sandboxes can't share one."""
    isolated = orchestration.config.sandbox.isolation != "none"
    if orchestration.provider != "local" or not isolated or agent.network != "model_api":
        return None
    folder = _place(home, lease_id)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def remove_exchange_folder(home: Path, lease_id: str) -> None:
    """Remove it, if there was one."""
    shutil.rmtree(_place(home, lease_id), ignore_errors=True)


def _place(home: Path, lease_id: str) -> Path:
    return home / "exchange" / lease_id
