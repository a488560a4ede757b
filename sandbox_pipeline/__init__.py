"""One coding prompt, one git repository, N isolated attempts, on Dagster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sandbox_pipeline.config import OrchestrationConfig as OrchestrationConfig
    from sandbox_pipeline.defs.build import build_orchestration as build_orchestration
    from sandbox_pipeline.launching import launch as launch
    from sandbox_pipeline.store import Store as Store

# Loaded when first used: importing the package must not cost a Dagster import.
_LAZY = {
    "OrchestrationConfig": "sandbox_pipeline.config",
    "Store": "sandbox_pipeline.store",
    "build_orchestration": "sandbox_pipeline.defs.build",
    "launch": "sandbox_pipeline.launching",
}

__all__ = ["OrchestrationConfig", "Store", "__version__", "build_orchestration", "launch"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
