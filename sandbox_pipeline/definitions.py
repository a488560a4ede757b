"""The code location: what `workspace.yaml` and `dg` load."""

from __future__ import annotations

import logging
import os

import dagster as dg

from sandbox_pipeline import demo
from sandbox_pipeline.defs.build import build_orchestration
from sandbox_pipeline.defs.orchestrations import load_orchestrations
from sandbox_pipeline.defs.sensors import SENSORS
from sandbox_pipeline.settings import Settings


@dg.definitions
def defs() -> dg.Definitions:
    """The main orchestration, prefilled with the demo, and those of the folder."""
    settings = Settings.from_environ(os.environ)
    logging.getLogger("sandbox_pipeline").setLevel(settings.log_level)
    main = build_orchestration(config=demo.CONFIG, executor=settings.executor)
    named = load_orchestrations(settings.orchestrations, settings.executor)
    watch = dg.Definitions(sensors=SENSORS)
    return dg.Definitions.merge(main, watch, *named.definitions)
