"""What Dagster is given: names, configuration, files that fail alone, use in other projects."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
import yaml

from sandbox_pipeline import build_orchestration, demo
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.definitions import defs
from sandbox_pipeline.defs.launchpad import launchpad_schema
from sandbox_pipeline.defs.orchestrations import load_file, load_orchestrations
from sandbox_pipeline.errors import ConfigError

ROOT = Path(__file__).parents[1]
GOOD: dict[str, Any] = {"prompt": "p", "agent": {"command": "true"}}


def repository(definitions: dg.Definitions) -> dg.RepositoryDefinition:
    return definitions.get_repository_def()


def ops_of(loaded: dg.RepositoryDefinition) -> dict[str, dg.OpDefinition]:
    graph = loaded.get_job("orchestration_job").graph.node_dict["fork_metrics"].definition
    assert isinstance(graph, dg.GraphDefinition)
    return {
        node.name: node.definition
        for node in graph.nodes
        if isinstance(node.definition, dg.OpDefinition)
    }


def test_the_names_that_others_build_on_stay(home: Path) -> None:
    loaded = repository(defs())
    assert {job.name for job in loaded.get_all_jobs()} == {"__ASSET_JOB", "orchestration_job"}
    keys = {key.to_user_string() for key in loaded.asset_graph.get_all_asset_keys()}
    assert {"fork_metrics", "orchestration_summary"} <= keys
    assert [sensor.name for sensor in loaded.sensor_defs][:1] == ["sandbox_reaper"]
    assert {
        "orchestrate",
        "create_sandbox",
        "health_check",
        "run_agent",
        "record_metrics",
        "cleanup_sandbox",
        "check_completion",
    } <= set(ops_of(loaded))


def test_later_stages_have_the_higher_priority(home: Path) -> None:
    ops = ops_of(repository(defs()))
    priority = {name: int(op.tags["dagster/priority"]) for name, op in ops.items()}
    order = ["create_sandbox", "health_check", "run_agent", "record_metrics", "cleanup_sandbox"]
    values = [priority[name] for name in order]
    assert values == sorted(set(values))


def test_every_field_is_in_the_launchpad_with_its_description() -> None:
    schema = launchpad_schema(demo.CONFIG)
    assert set(schema) == set(OrchestrationConfig.model_fields)
    assert all(field.description for field in schema.values())
    assert schema["repo_url"].default_value == "demo"


def test_two_orchestrations_live_in_one_project() -> None:
    both = dg.Definitions.merge(
        build_orchestration(name="one", config=GOOD, max_concurrent=10, retry_attempts=5),
        build_orchestration(name="two", config=GOOD, cron="0 3 * * *", timezone="Asia/Tokyo"),
    )
    loaded = repository(both)
    assert {"one_job", "two_job"} <= {job.name for job in loaded.get_all_jobs()}
    [schedule] = loaded.schedule_defs
    assert (schedule.name, schedule.execution_timezone) == ("two_schedule", "Asia/Tokyo")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    fields: Any = cast("Any", loaded.get_job("one_job").run_config_schema.config_type).fields
    assert "one__fork_metrics" in fields["ops"].config_type.fields


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "Bad Name"}, "name: 'Bad Name' must be"),
        ({"name": "x", "max_concurrent": 0}, "max_concurrent"),
        ({"name": "x", "retry_attempts": 0}, "retry.attempts"),
        ({"name": "x", "no_such_field": 1}, "no_such_field: is not a field"),
        ({"name": "x", "cron": "every day"}, "x: cron or timezone"),
        ({"name": "x", "cron": "0 3 * * *", "timezone": "Mars/Olympus"}, "x: cron or timezone"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_orchestration(config=GOOD, **arguments)
    assert expected in str(caught.value)


def test_broken_files_fail_alone_naming_file_and_field(tmp_path: Path) -> None:
    good = yaml.safe_dump({**GOOD, "cron": "0 3 * * *"})
    (tmp_path / "good.yaml").write_text(good, encoding="utf-8")
    broken = {
        "syntax.yaml": "a: [",
        "field.yaml": "prompt: x\nagent: {command: x}\nnum_fork: 1",
        "type.yaml": "prompt: x\nagent: {command: x}\nnum_forks: many",
        "cron.yaml": "prompt: x\nagent: {command: x}\ncron: 5",
        "list.yaml": "- x",
        "Bad Name.yaml": "prompt: x\nagent: {command: x}",
    }
    for name, text in broken.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = load_orchestrations(tmp_path, "async")
    assert len(loaded.definitions) == 1
    assert len(loaded.errors) == len(broken)
    for name in broken:
        assert any(name in error for error in loaded.errors), name
    text = "\n".join(loaded.errors)
    for expected in ("not valid YAML", "num_fork: is not a field", "num_forks: ", "cron: must be"):
        assert expected in text


def test_a_missing_folder_is_an_empty_one(tmp_path: Path) -> None:
    assert load_orchestrations(tmp_path / "none", "async").definitions == []


def test_the_examples_load() -> None:
    load_file(ROOT / "examples" / "nightly.yaml", "async")
    spec = importlib.util.spec_from_file_location("own", ROOT / "examples" / "own_project.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    jobs = {job.name for job in repository(module.defs).get_all_jobs()}
    assert {"nightly_job", "wide_job"} <= jobs


def test_both_executors_have_the_same_job(home: Path) -> None:
    for executor in ("async", "multiprocess"):
        job = repository(build_orchestration(config=GOOD, executor=executor)).get_job(
            "orchestration_job"
        )
        assert job.executor_def.name == f"sandbox_{executor}"
