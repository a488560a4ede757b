"""What the environment says; every variable is in `VARIABLES`, secrets by name only."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from sandbox_pipeline.errors import ConfigError

PREFIX = "SANDBOX_PIPELINE_"
EXECUTORS = ("async", "multiprocess", "celery", "k8s")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

ExecutorName = Literal["async", "multiprocess", "celery", "k8s"]

VARIABLES: dict[str, tuple[str, str]] = {
    "E2B_API_KEY": ("", "Key of E2B; with it, `sandbox.provider: auto` means E2B."),
    "ANTHROPIC_API_KEY": ("", "Key of Anthropic's API, for agents that use it and for the judge."),
    "GITHUB_TOKEN": ("", "Token to clone private repositories over https."),
    "DAGSTER_HOME": (
        "~/.local/share/sandbox_pipeline",
        "Folder of the Dagster instance; store, artifacts and local sandboxes are beside it.",
    ),
    f"{PREFIX}DB_URL": (
        "sqlite:///$DAGSTER_HOME/sandbox_pipeline.db",
        "State store, any SQLAlchemy URL.",
    ),
    f"{PREFIX}ARTIFACTS": (
        "$DAGSTER_HOME/artifacts",
        "Folder for patches, transcripts and logs.",
    ),
    f"{PREFIX}ORCHESTRATIONS": (
        "./orchestrations",
        "Folder of *.yaml files, each a named orchestration: a job and, with cron, a schedule.",
    ),
    f"{PREFIX}GITHUB_API": (
        "https://api.github.com",
        "GitHub's API, for pull requests; another one for GitHub Enterprise.",
    ),
    f"{PREFIX}PORT": ("3000", "Port of the UI."),
    f"{PREFIX}LOG_LEVEL": ("WARNING", "Of this package's own log: DEBUG, INFO, WARNING or ERROR."),
    "ANTHROPIC_BASE_URL": ("https://api.anthropic.com", "Where the model API is."),
    f"{PREFIX}PRICES": ("", "YAML file with prices of models, over the built-in ones."),
    f"{PREFIX}E2B_PRICES": (
        "0.000014 0.0000045",
        "US dollars for a second of one CPU and of one GiB of an E2B sandbox.",
    ),
    f"{PREFIX}EXECUTOR": (
        "async",
        "How ops run: `async` (all on one event loop), `multiprocess` (a process each), `celery` "
        "(on Celery workers) or `k8s` (a Kubernetes Job each); docs/scaling.md says when.",
    ),
    f"{PREFIX}CELERY_BROKER": (
        "redis://127.0.0.1:6379/0",
        "URL of the Redis that the `celery` executor hands ops out by.",
    ),
    f"{PREFIX}DAILY_BUDGET_USD": (
        "",
        "Most US dollars that all agents and judges may spend on models in one day (UTC).",
    ),
    f"{PREFIX}SILENT_SECONDS": (
        "60",
        "A run that gave no sign of life for so many seconds counts as dead: another may take "
        "its orchestration over.",
    ),
}
"""Name to default and meaning, in the order of the docs."""


@dataclass(frozen=True)
class Settings:
    """The settings of this deployment.

    Attributes:
        home: folder of the Dagster instance.
        orchestrations: folder of the named orchestrations; may be missing.
    """

    home: Path
    db_url: str
    artifacts: Path
    orchestrations: Path
    port: int
    log_level: str
    executor: ExecutorName
    celery_broker: str
    daily_budget_usd: float | None = None
    silent_seconds: float = 60.0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, home: Path | None = None) -> Settings:
        """Read the environment.

        Args:
            environ: usually `os.environ`.
            home: of the Dagster instance in use, where it is known; else by DAGSTER_HOME.

        Raises:
            ConfigError: a variable has a value that can't be used; it is named.
        """
        root = home or default_home(environ)

        def value(name: str, default: str) -> str:
            return environ.get(PREFIX + name, "").strip() or default

        port = value("PORT", "3000")
        if not port.isdigit() or not 1 <= int(port) <= 65_535:
            msg = f"{PREFIX}PORT: {port!r} is not a port (1 to 65535)"
            raise ConfigError(msg)
        budget = value("DAILY_BUDGET_USD", "")
        return cls(
            home=root,
            db_url=value("DB_URL", f"sqlite:///{root / 'sandbox_pipeline.db'}"),
            artifacts=Path(value("ARTIFACTS", str(root / "artifacts"))).expanduser().absolute(),
            orchestrations=Path(value("ORCHESTRATIONS", "orchestrations")).expanduser().absolute(),
            port=int(port),
            log_level=_choice("LOG_LEVEL", value("LOG_LEVEL", "WARNING").upper(), LOG_LEVELS),
            executor=cast(
                "ExecutorName", _choice("EXECUTOR", value("EXECUTOR", "async"), EXECUTORS)
            ),
            celery_broker=_broker(value("CELERY_BROKER", "redis://127.0.0.1:6379/0")),
            daily_budget_usd=_positive("DAILY_BUDGET_USD", budget) if budget else None,
            silent_seconds=_positive("SILENT_SECONDS", value("SILENT_SECONDS", "60")),
        )


def default_home(environ: Mapping[str, str]) -> Path:
    """DAGSTER_HOME, else a folder of this package in the user's data folder."""
    if environ.get("DAGSTER_HOME"):
        return Path(environ["DAGSTER_HOME"]).expanduser().absolute()
    data = environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")  # noqa: PTH111 - without a home folder it leaves ~, and the error then names the path
    return Path(data) / "sandbox_pipeline"


def _broker(url: str) -> str:
    if not url.startswith(("redis://", "rediss://", "redis+socket://")):
        scheme = url.partition("://")[0] if "://" in url else "(none)"
        msg = f"{PREFIX}CELERY_BROKER: a URL with scheme {scheme!r} is not one of Redis (redis://…)"
        raise ConfigError(msg)
    return url


def _positive(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        msg = f"{PREFIX}{name}: {value!r} is not a number above 0"
        raise ConfigError(msg)
    return number


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        msg = f"{PREFIX}{name}: {value!r} is not one of {', '.join(allowed)}"
        raise ConfigError(msg)
    return value
