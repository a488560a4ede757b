"""The product as people use it in the browser's back: a real webserver with its daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sandbox_pipeline import demo, launch
from sandbox_pipeline.config import parse_config
from sandbox_pipeline.launching import LaunchError
from tests.processes import live_sandboxes, wait_until_gone
from tests.webserver import Webserver, deployed_webserver

NIGHTLY = f"""\
cron: "* * * * *"
timezone: Europe/Paris
repo_url: demo
prompt: {demo.PROMPT}
num_forks: 1
agent:
  command: python3 agent.py {{prompt_file}} 0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webserver]:
    folder = tmp_path_factory.mktemp("ui")
    files = {"nightly.yaml": NIGHTLY, "broken.yaml": "prompt: x\nnum_forks: 0\n"}
    with deployed_webserver(folder, files) as running:
        yield running


def test_a_run_launched_as_from_the_launchpad_materializes_the_metrics(server: Webserver) -> None:
    run_id = launch(demo.CONFIG, url=server.url)
    assert server.wait_for_status(run_id, "SUCCESS", "FAILURE") == "SUCCESS"
    query = """query($key: AssetKeyInput!) { assetOrError(assetKey: $key) { ... on Asset {
        assetMaterializations(limit: 1) { runId metadataEntries { label
            ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue }
            ... on TableMetadataEntry { table { records } } } } } } }"""
    found = server.graphql(query, key={"path": ["fork_metrics"]})["assetOrError"]
    [latest] = found["assetMaterializations"]
    assert latest["runId"] == run_id
    entries = {entry["label"]: entry for entry in latest["metadataEntries"]}
    assert entries["num_forks"]["intValue"] == 3
    assert entries["succeeded"]["intValue"] == 1
    assert entries["success_rate"]["floatValue"] == pytest.approx(1 / 3)
    assert len(entries["forks"]["table"]["records"]) == 3
    summary = server.graphql(query, key={"path": ["orchestration_summary"]})["assetOrError"]
    assert summary["assetMaterializations"][0]["runId"] == run_id


def test_the_launchpad_is_prefilled_with_the_demo_and_describes_each_field(
    server: Webserver,
) -> None:
    query = """{ runConfigSchemaOrError(selector: {repositoryName: "__repository__",
        repositoryLocationName: "sandbox_pipeline", pipelineName: "orchestration_job"}) {
        ... on RunConfigSchema { rootDefaultYaml allConfigTypes {
            ... on CompositeConfigType { fields { name description } } } } } }"""
    schema = server.graphql(query)["runConfigSchemaOrError"]
    assert "repo_url: demo" in schema["rootDefaultYaml"]
    assert demo.PROMPT in schema["rootDefaultYaml"].replace("\n          ", " ")
    types: list[dict[str, list[dict[str, str]]]] = schema["allConfigTypes"]
    fields = {
        field["name"]: field["description"]
        for config_type in types
        for field in config_type.get("fields") or []
    }
    assert fields["max_concurrent"].startswith("Most sandboxes of this orchestration")
    assert fields["orphan_grace_seconds"].startswith("How long a sandbox lives on")


def test_bad_configuration_is_refused_by_the_webserver_before_a_run(server: Webserver) -> None:
    """As the launchpad sends it, past the check that `launch` makes on this side."""
    config = parse_config({"prompt": "x", "agent": {"command": "true"}})
    config = config.model_copy(update={"num_forks": 0})
    count = "{ runsOrError { ... on Runs { count } } }"
    before = server.graphql(count)
    with pytest.raises(LaunchError, match="num_forks: Input should be greater than or equal to 1"):
        launch(config, url=server.url)
    assert server.graphql(count) == before


def test_a_repository_that_does_not_exist_fails_the_run_with_one_message(
    server: Webserver,
) -> None:
    run_id = launch({**demo.CONFIG, "repo_url": "/no/such/repo"}, url=server.url)
    server.wait_for_status(run_id, "FAILURE")
    assert any(
        "repo_url: no such folder: /no/such/repo" in text for text in server.failures(run_id)
    )


def test_cancel_ends_every_sandbox_and_the_run_stays_canceled(server: Webserver) -> None:
    config = {
        **demo.CONFIG,
        "workflow_id": "to-cancel",
        "num_forks": 4,
        "max_concurrent": 3,
        "agent": {"command": "sh -c 'trap : INT TERM; echo a > work; while :; do sleep 1; done'"},
    }
    run_id = launch(config, url=server.url)
    deadline = time.monotonic() + 60
    while len(list(server.home.glob("sandboxes/*/home/*/work"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(live_sandboxes(server.home)) == 3
    query = """mutation($id: String!) { terminateRun(runId: $id) { __typename } }"""
    assert server.graphql(query, id=run_id)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    assert wait_until_gone(server.home, 10) == []
    server.wait_for_status(run_id, "CANCELED", seconds=20)
    time.sleep(2)
    assert server.run_status(run_id) == "CANCELED"
    shown = subprocess.run(
        [sys.executable, "-m", "sandbox_pipeline", "show", "to-cancel", "--json"],
        env={**os.environ, "DAGSTER_HOME": str(server.home)},
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    forks = json.loads(shown)["forks"]
    assert [fork["outcome"] for fork in forks] == ["cancelled"] * 4
    assert sorted(fork["insertions"] or 0 for fork in forks) == [0, 1, 1, 1], "as far as they got"


def test_a_broken_file_fails_alone_and_the_other_has_job_and_schedule(server: Webserver) -> None:
    query = """{ repositoriesOrError { ... on RepositoryConnection { nodes {
        jobs { name } schedules { name } sensors { name } } } } }"""
    [node] = server.graphql(query)["repositoriesOrError"]["nodes"]
    jobs = {job["name"] for job in node["jobs"]}
    assert {"orchestration_job", "nightly_job"} <= jobs
    assert [schedule["name"] for schedule in node["schedules"]] == ["nightly_schedule"]
    assert [sensor["name"] for sensor in node["sensors"]] == [
        "sandbox_reaper",
        "sandbox_reaper_on_cancel",
        "sandbox_reaper_on_failure",
    ]
    log = (server.home.parent / "webserver.log").read_text(encoding="utf-8")
    assert "broken.yaml: num_forks: Input should be greater than or equal to 1 (got 0)" in log


def test_a_schedule_that_is_turned_on_ticks_and_runs(server: Webserver) -> None:
    selector = {
        "repositoryLocationName": "sandbox_pipeline",
        "repositoryName": "__repository__",
        "scheduleName": "nightly_schedule",
    }
    start = (
        """mutation($s: ScheduleSelector!) { startSchedule(scheduleSelector: $s) { __typename } }"""
    )
    started = server.graphql(start, s=selector)["startSchedule"]["__typename"]
    assert started == "ScheduleStateResult"
    query = """query($s: ScheduleSelector!) { scheduleOrError(scheduleSelector: $s) {
        ... on Schedule { id scheduleState { ticks { status runIds } } } } }"""
    deadline = time.monotonic() + 100
    runs: list[str] = []
    while not runs and time.monotonic() < deadline:
        state = server.graphql(query, s=selector)["scheduleOrError"]["scheduleState"]
        runs = [run for tick in state["ticks"] for run in tick["runIds"]]
        time.sleep(0.5)
    assert runs, "the schedule never ticked"
    stop = """mutation($id: String!) { stopRunningSchedule(id: $id) { __typename } }"""
    schedule_id = server.graphql(query, s=selector)["scheduleOrError"]["id"]
    server.graphql(stop, id=schedule_id)
    assert server.wait_for_status(runs[0], "SUCCESS", "FAILURE") == "SUCCESS"


def test_launching_at_nothing_says_how_to_start_a_webserver() -> None:
    with pytest.raises(LaunchError, match="sandbox-pipeline ui"):
        launch(demo.CONFIG, url="http://127.0.0.1:9")
