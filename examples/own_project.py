"""Two named orchestrations in a Dagster project of one's own: dagster dev -f own_project.py."""

import dagster as dg

from sandbox_pipeline import build_orchestration

AGENT = {"command": "python3 agent.py {prompt_file} {fork_num}"}
CONFIG = {"repo_url": "demo", "prompt": "Make the failing test pass.", "agent": AGENT}

defs = dg.Definitions.merge(
    build_orchestration(name="nightly", config=CONFIG, cron="0 3 * * *", timezone="Europe/Paris"),
    build_orchestration(name="wide", config=CONFIG, max_concurrent=10, retry_attempts=5),
)
