"""The embedded Dagster instance: its folder, and its configuration on first use."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_pipeline.errors import ConfigError

TEMPLATE = Path(__file__).parent / "dagster.yaml"


def ensure_home(home: Path) -> Path:
    """Make the folder a Dagster instance unless it is one, and point DAGSTER_HOME to it.

    Raises:
        ConfigError: the folder can't be made or written.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        config = home / "dagster.yaml"
        if not config.exists():
            config.write_bytes(TEMPLATE.read_bytes())
    except OSError as error:
        msg = f"DAGSTER_HOME: {home} can't be used: {error.strerror}"
        raise ConfigError(msg) from error
    os.environ["DAGSTER_HOME"] = str(home)
    return home
