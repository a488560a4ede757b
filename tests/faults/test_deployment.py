"""A real webserver with its daemon: one part of it is killed under a run; and no secret is left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from sandbox_pipeline import demo, launch
from sandbox_pipeline.cli.common import with_runtime
from sandbox_pipeline.config import SandboxConfig
from sandbox_pipeline.instance import ensure_home
from sandbox_pipeline.ownership import process_started
from sandbox_pipeline.records import Orchestration, Owner, orchestration_key
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import SandboxSpec
from tests.conftest import make_repo
from tests.faults.truth import secrets_in
from tests.processes import live_sandboxes, wait_until_gone
from tests.servers.e2b_server import E2BServer, api_error
from tests.servers.git_http import git_server
from tests.test_cli import cli
from tests.webserver import Webserver, running_webserver

VICTIMS = {
    "webserver": "dagster_webserver",
    "daemon": "dagster._daemon",
    "code server": "dagster api grpc",
}
AGENT = "sh -c 'echo run >> runs; while ! test -e ../go; do sleep 0.2; done'"
LEAKING_AGENT = """\
import base64, os, pathlib, sys, urllib.parse
key = os.environ["ANTHROPIC_API_KEY"]
said = [key, base64.b64encode(key.encode()).decode(), urllib.parse.quote(key, safe="")]
for stream in (sys.stdout, sys.stderr):
    print("\\n".join(said), file=stream)
pathlib.Path("leak").write_text("\\n".join(said))
sys.exit(3)
"""
KEYS = {
    "ANTHROPIC_API_KEY": "sk-ant-canary+41/0 c9",
    "E2B_API_KEY": "e2b_5ca1ab1e0ddba11c0ffee5ca1ab1e0ddba11c0ff",
    "GITHUB_TOKEN": "ghp_canary/9b+72de5c1180",
}


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_goes_on_when_a_part_of_dagster_is_killed_and_the_reaper_needs_none_of_it(
    tmp_path: Path, home: Path, victim: str
) -> None:
    ensure_home(home)
    config = {**demo.CONFIG, "workflow_id": "w", "num_forks": 2, "agent": {"command": AGENT}}
    with running_webserver(home, tmp_path) as server:
        run_id = launch(config, url=server.url)
        until(lambda: len(list(home.glob("sandboxes/*/home/*/runs"))) == 2)
        sandboxes = live_sandboxes(home)
        owner = owner_of("w")
        killed = kill(server, VICTIMS[victim])
        assert owner.pid not in killed
        until(lambda: not any(process_started(pid) for pid in killed))
        # Dagster's own reaction, such as ending the rest of `dagster dev`, has its time.
        time.sleep(5)
        assert process_started(owner.pid) == owner.pid_started, "the run's worker lives"
        assert live_sandboxes(home) == sandboxes

        orphan = with_runtime(an_orphan)
        reaped = json.loads(cli("reap", "--json").stdout)
        assert [item["sandbox_id"] for item in reaped] == [orphan]
        assert live_sandboxes(home) == sandboxes, "those of the living run are left alone"

        for name in sandboxes:
            (home / "sandboxes" / name / "home" / "go").touch()
        with dg.DagsterInstance.get() as instance:
            until(lambda: (run := instance.get_run_by_id(run_id)) is not None and run.is_finished)
            run = instance.get_run_by_id(run_id)
            assert run is not None
            assert run.status is dg.DagsterRunStatus.SUCCESS
            assert len(instance.get_runs()) == 1, "nothing was run again"
    rows = json.loads(cli("show", "w", "--json").stdout)["forks"]
    assert [(row["outcome"], row["insertions"]) for row in rows] == [("success", 1)] * 2
    assert sorted(row["sandbox_id"] for row in rows) == sandboxes
    assert wait_until_gone(home, 10) == []


def kill(server: Webserver, mark: str) -> list[int]:
    """SIGKILL to the processes of this `dagster dev` with the mark on their command line."""
    found = [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if mark in " ".join(process.cmdline())
    ]
    assert found, f"no {mark}"
    for process in found:
        process.kill()
    return [process.pid for process in found]


def owner_of(workflow_id: str) -> Owner:
    async def read(runtime: Runtime) -> Owner:
        found = await runtime.store.need(Orchestration, orchestration_key(workflow_id))
        assert found.owner is not None
        return found.owner

    return with_runtime(read)


async def an_orphan(runtime: Runtime) -> str:
    """A sandbox of this deployment that no lease speaks of and that is old enough to be sure."""
    marks = {"app": "sandbox_pipeline", "deployment_id": await runtime.deployment_id()}
    spec = SandboxSpec(
        lease_id="orphan",
        metadata={**marks, "workflow_id": "gone", "lease_id": "orphan"},
        ttl_seconds=600,
        network="none",
        config=SandboxConfig(provider="local"),
    )
    sandbox = await runtime.provider("local").create(spec)
    meta = runtime.settings.home / "sandboxes" / sandbox.sandbox_id / "meta.json"
    known: dict[str, Any] = json.loads(await asyncio.to_thread(meta.read_text, "utf-8"))
    known["started_at"] -= 3600
    await asyncio.to_thread(meta.write_text, json.dumps(known), "utf-8")
    return sandbox.sandbox_id


def until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_no_key_is_left_anywhere_by_runs_that_a_webserver_launched(
    tmp_path: Path, home: Path
) -> None:
    """A private repository, a cloud, an agent that prints the model's key; and a refused key."""
    ensure_home(home)
    make_repo(tmp_path / "served" / "private", {"agent.py": LEAKING_AGENT})
    with (
        git_server(tmp_path / "served", KEYS["GITHUB_TOKEN"]) as git_url,
        E2BServer(api_key=KEYS["E2B_API_KEY"]) as cloud,
        running_webserver(home, tmp_path, **{**cloud.environ, **KEYS}) as server,
    ):
        config = {
            "repo_url": f"{git_url}/private/.git",
            "prompt": "p",
            "num_forks": 2,
            "agent": {"command": "python3 agent.py", "env_from": ["ANTHROPIC_API_KEY"]},
            "sandbox": {"provider": "e2b"},
        }
        run_id = launch({**config, "workflow_id": "leaky"}, url=server.url)
        server.wait_for_status(run_id, "SUCCESS", seconds=200)
        text = f"key {KEYS['E2B_API_KEY']} is not valid"
        cloud.faults.add(api_error(401, text, times=0, path="/v2/sandboxes"))
        refused = launch({**config, "workflow_id": "refused"}, url=server.url)
        server.wait_for_status(refused, "FAILURE", seconds=200)
        shown = [json.dumps(server.events(each)) for each in (run_id, refused)]
        assert cloud.ledger.live() == []
    forks = json.loads(cli("show", "leaky", "--json").stdout)["forks"]
    assert [(fork["outcome"], fork["secret_leak"]) for fork in forks] == [("failed", True)] * 2
    assert "E2B_API_KEY" in shown[1], "the refused one is named"
    for name in ("sandbox_pipeline.db", "artifacts/leaky/report.html"):
        assert (home / name).is_file(), "what is looked through is there"
    assert (tmp_path / "webserver.log").stat().st_size > 0
    assert list(home.glob("storage/**/compute_logs/*")), "compute logs too"
    (tmp_path / "shown.json").write_text("\n".join(shown), encoding="utf-8")
    for name, value in KEYS.items():
        assert secrets_in(tmp_path, value) == [], name
