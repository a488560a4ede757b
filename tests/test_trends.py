"""Trends by model and repository: what Dagster is given to plot, and the rows over all of them."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest

from tests.conftest import make_repo
from tests.test_cli import cli

COST = '{"type":"step_finish","part":{"cost":%s,"tokens":{"input":7}}}'
AGENT = "sh agent.sh {model} {fork_num}"
SCRIPT = f"""\
echo $2 > made
case $1 in sonnet) echo '{COST % 0.25}';; *) echo '{COST % 1.5}';; esac
"""


def run(repo: Path, model: str, name: str, verify: str | None) -> None:
    line = ["run", "--json", "--repo", str(repo), "--prompt", "p", "--forks", "2", "--model", model]
    line += ["--command", AGENT, "--provider", "local", "--workflow-id", name]
    line += ["--set", "agent.usage_format=opencode-jsonl"]
    done = cli(*line, *(["--set", f"verify_command={verify}"] if verify else []))
    assert done.returncode == 0, done.stderr


def test_each_model_and_repository_has_plots_of_its_own(home: Path, tmp_path: Path) -> None:
    shop, blog = (make_repo(tmp_path / name, {"agent.sh": SCRIPT}) for name in ("shop", "blog"))
    run(shop, "sonnet", "one", "grep -qx 0 made")
    run(shop, "opus", "two", "test -f made")
    run(blog, "opus", "three", None)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        records = instance.fetch_materializations(dg.AssetKey("trends"), limit=10).records
        latest = instance.get_latest_materialization_event(dg.AssetKey("trends"))
    plotted = [
        {
            name: entry.value
            for name, entry in record.asset_materialization.metadata.items()
            if isinstance(entry, dg.FloatMetadataValue)
        }
        for record in reversed(records)
        if record.asset_materialization is not None
    ]
    shop_name, blog_name = str(shop)[-80:], str(blog)[-80:]
    of = [f"sonnet on {shop_name}", f"opus on {shop_name}", f"opus on {blog_name}"]
    seconds = [
        found.pop(f"agent_seconds_p50: {side}") for found, side in zip(plotted, of, strict=True)
    ]
    assert all(isinstance(value, float) and value > 0 for value in seconds)
    assert plotted == [
        {f"verified_rate: {of[0]}": 0.5, f"cost_per_verified_usd: {of[0]}": pytest.approx(0.5)},
        {f"verified_rate: {of[1]}": 1.0, f"cost_per_verified_usd: {of[1]}": pytest.approx(1.5)},
        {f"success_rate: {of[2]}": 1.0, f"cost_per_success_usd: {of[2]}": pytest.approx(1.5)},
    ]
    assert latest is not None
    assert latest.asset_materialization is not None
    table = latest.asset_materialization.metadata["history"]
    assert isinstance(table, dg.TableMetadataValue)
    rows = [dict(record.data) for record in table.records]
    keys = ("model", "repository", "orchestrations", "forks", "passed", "verified")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("opus", blog_name, 1, 2, 2, False),
        ("opus", shop_name, 1, 2, 2, True),
        ("sonnet", shop_name, 1, 2, 1, True),
    ]
    sides = json.loads(cli("compare", "--last", "5", "--by", "model", "--json").stdout)
    assert [(side["name"], side["forks"], side["passed"]) for side in sides] == [
        ("opus", 4, 4),
        ("sonnet", 2, 1),
    ]
