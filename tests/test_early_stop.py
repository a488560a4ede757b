"""`stop_after_verified`: enough is enough."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sandbox_pipeline.config import parse_config
from sandbox_pipeline.errors import ConfigError
from tests.processes import live_sandboxes
from tests.test_cli import cli

AGENT = "sh -c 'echo {fork_num} > made; test {fork_num} = 0 || sleep 100'"


def test_once_enough_are_verified_the_rest_ends_within_seconds(home: Path, repo: Path) -> None:
    began = time.monotonic()
    done = cli("run", "--repo", str(repo), "--prompt", "p", "--forks", "10", "--max-concurrent",
               "4", "--command", AGENT, "--json", "--set", "verify_command=grep -q 0 made",
               "--set", "stop_after_verified=1",
               "--set", "fail_run_below_success_rate=0.9")  # fmt: skip
    assert time.monotonic() - began < 40, "not the 100 s of the others"
    assert done.returncode == 0, done.stdout + done.stderr
    assert live_sandboxes(home) == []
    result = json.loads(done.stdout)
    assert [fork["outcome"] for fork in result["forks"]] == ["success"] + ["cancelled"] * 9
    assert "no longer needed: 1 verified" in result["forks"][5]["message"]
    assert result["winner"] == 0
    summary = result["summary"]
    assert (summary["verified"], summary["stopped_early"], summary["cancelled"]) == (1, 9, 9)
    assert summary["saved_agent_seconds"] is not None
    assert summary["saved_usd"] is None, "no cost is known"
    assert "9 forks were stopped early" in cli("show").stdout
    events = [json.loads(line) for line in cli("events", "--json").stdout.splitlines()]
    verified = next(e["time"] for e in events if e["name"] == "patch-verified")
    last = max(e["time"] for e in events if e["name"] == "orchestration-completed")
    assert last - verified < 10


def test_it_needs_something_that_verifies() -> None:
    data = {"prompt": "p", "agent": {"command": "true"}, "stop_after_verified": 1}
    with pytest.raises(ConfigError, match="needs verify_command"):
        parse_config(data)
