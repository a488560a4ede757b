"""Every `*.yaml` in the orchestrations folder is a named orchestration."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from sandbox_pipeline.config import SCHEDULE_FIELDS, read_yaml
from sandbox_pipeline.defs.build import build_orchestration
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.settings import ExecutorName

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What came of the folder.

    Attributes:
        definitions: of each file that could be read.
        errors: a message for each that could not; it names file and field.
    """

    definitions: list[dg.Definitions]
    errors: list[str]


def load_orchestrations(folder: Path, executor: ExecutorName) -> Loaded:
    """Read the folder; a broken file fails alone. A missing folder is an empty one."""
    definitions: list[dg.Definitions] = []
    errors: list[str] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            definitions.append(load_file(path, executor))
        except ConfigError as error:
            errors.append(str(error))
            logger.error("%s", error)  # noqa: TRY400 - the message is all there is to say
    return Loaded(definitions, errors)


def load_file(path: Path, executor: ExecutorName) -> dg.Definitions:
    """The definitions of one file, named after it.

    Raises:
        ConfigError: naming the file and the field.
    """
    data = read_yaml(path)
    config = {name: value for name, value in data.items() if name not in SCHEDULE_FIELDS}
    cron, timezone = data.get("cron"), data.get("timezone", "UTC")
    for name, value in (("cron", cron), ("timezone", timezone)):
        if value is not None and not isinstance(value, str):
            msg = f"{path}: {name}: must be text, got {value!r}"
            raise ConfigError(msg)
    try:
        return build_orchestration(
            name=path.stem.replace("-", "_"),
            config=config,
            cron=cron,
            timezone=timezone,
            executor=executor,
        )
    except ConfigError as error:
        text = str(error).replace(f"{path.stem.replace('-', '_')}: ", "", 1)
        msg = f"{path}: {text}"
        raise ConfigError(msg) from error
