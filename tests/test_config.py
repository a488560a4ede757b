"""Bad input gets one clear message, before anything is created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.config import parse_config, read_yaml
from sandbox_pipeline.errors import ConfigError

GOOD: dict[str, Any] = {"prompt": "do it", "agent": {"command": "true"}}


def message_of(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, source="f.yaml")
    return str(caught.value)


def test_defaults_are_those_of_the_docs() -> None:
    config = parse_config(GOOD)
    assert (config.num_forks, config.max_concurrent, config.model) == (3, 5, "sonnet")
    assert config.agent.timeout_seconds == 7200
    assert config.agent.max_turns == 100
    assert config.sandbox.orphan_grace_seconds == 600
    assert (config.retry.attempts, config.retry.initial_seconds) == (3, 1)
    assert (config.retry.factor, config.retry.max_seconds) == (2, 30)
    assert (config.rate_limit.starts, config.rate_limit.window_ms) == (5, 1000)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_forks": 0}, "num_forks: Input should be greater than or equal to 1 (got 0)"),
        ({"num_forks": -1}, "num_forks: Input should be greater than or equal to 1 (got -1)"),
        ({"num_forks": 100000}, "num_forks: Input should be less than or equal to 1000"),
        ({"num_forks": "three"}, "num_forks: Input should be a valid integer"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": "  \n"}, "prompt: must not be empty"),
        ({"prompt": "a\0b"}, "prompt: must not contain a NUL byte"),
        ({"workflow_id": "Bad_Id"}, "workflow_id: must be 1 to 63 of a-z, 0-9 and '-'"),
        ({"workflow_id": "-x"}, "workflow_id: must be"),
        ({"workflow_id": "x" * 64}, "workflow_id: must be"),
        ({"forks": 3}, "forks: is not a field of this configuration"),
        ({"agent": {"command": "true", "timout": 1}}, "agent.timout: is not a field"),
        ({"agent": {"command": "a 'b"}}, "agent.command: is not a command line"),
        ({"agent": {"kind": "command"}}, "agent: command is required"),
        ({"agent": {"command": "x", "env_from": ["A=B"]}}, "'A=B' is not the name of an env"),
        ({"agent": {"command": "x", "timeout_seconds": 0}}, "agent.timeout_seconds"),
        ({"sandbox": {"read_only_paths": ["opt/x"]}}, "'opt/x' must be an absolute path"),
        ({"sandbox": {"isolation": "docker"}}, "sandbox.isolation: Input should be 'bubblewrap'"),
        ({"sandbox": {"network": "all"}}, "sandbox.network"),
        ({"model": "; rm -rf /"}, "model: String should match pattern"),
        ({"retry": {"attempts": 0}}, "retry.attempts"),
        ({"fail_run_below_success_rate": 2}, "fail_run_below_success_rate"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(changes: dict[str, Any], expected: str) -> None:
    message = message_of({**GOOD, **changes})
    assert message.startswith("f.yaml: ")
    assert expected in message
    assert len(message.splitlines()) == 1


def test_every_wrong_field_gets_its_line() -> None:
    message = message_of({**GOOD, "num_forks": 0, "model": ""})
    assert len(message.splitlines()) == 2


def test_a_credential_in_a_value_is_not_echoed() -> None:
    message = message_of({**GOOD, "branch": ["https://user:hunter2hunter2@x"]})
    assert "hunter2" not in message


def test_a_list_is_taken_as_a_command_line() -> None:
    config = parse_config({**GOOD, "agent": {"command": ["a b", "{prompt_file}"]}})
    assert config.agent.command == "'a b' '{prompt_file}'"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [", "not valid YAML"),
        (b"- 1", "expected a mapping of fields, got list"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.yaml") as caught:
        read_yaml(path)
    assert expected in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
