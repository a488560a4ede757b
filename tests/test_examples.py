"""Every example can be run as it is, given its key and its program."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sandbox_pipeline.agents.command import CommandAgent, fill_template
from sandbox_pipeline.agents.transcript import read_transcript
from sandbox_pipeline.agents.usage import PARSERS
from sandbox_pipeline.config import OrchestrationConfig, parse_config
from sandbox_pipeline.conformance.bench import Listener, bench
from sandbox_pipeline.records import Outcome

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))
PRESETS = ["aider", "codex", "gemini", "mini-swe-agent", "opencode"]
# Stands where the preset's program would be: says how it was called and leaves what it was told.
PROGRAM = """\
#!/bin/sh
for word in "$@"; do printf '<%s>' "$word"; done
echo
[ -t 0 ] || cat
for word in "$@"; do last=$word; done
case "$*" in *--output\\ *) echo '{"info": {"model_stats": {"api_calls": 2}}}' > "$last";; esac
"""


def load(path: Path) -> OrchestrationConfig:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields = {name: value for name, value in data.items() if name not in ("cron", "timezone")}
    return parse_config(fields, source=path.name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid(path: Path) -> None:
    config = load(path)
    assert config.agent.usage_format in PARSERS
    assert config.agent.timeout_seconds <= 3600, "an example must not run for hours"


def test_every_preset_is_there() -> None:
    names = [path.stem for path in EXAMPLES]
    assert set(names) >= {*PRESETS, "claude-on-e2b"}


@pytest.mark.parametrize("name", PRESETS)
async def test_preset_hands_over_prompt_and_model_as_they_are(tmp_path: Path, name: str) -> None:
    """Its command line is run with a program that tells what it was given."""
    config = load(Path(__file__).parent.parent / "examples" / f"{name}.yaml")
    environ = {**dict.fromkeys(config.agent.env_from, "key-1234567"), "PATH": os.environ["PATH"]}
    CommandAgent().validate(config.agent, environ, provider="local")
    async with bench(tmp_path, CommandAgent(), config.agent, environ, network="none") as made:
        prompt = "Say \"hi\" & 'bye' $(touch pwned)\nsecond line"
        task = await made.task(config.agent, prompt=prompt, model=config.model)
        task = replace(task, model=config.model)
        words = shlex.split(fill_template(task)[2])
        program = next(word for word in words if word.startswith("$HOME/"))
        path = program.replace("$HOME", "/home/user")
        await made.sandbox.write(path, PROGRAM.encode())
        await made.sh(f"chmod +x {path}")
        result = await CommandAgent().run(made.sandbox, task, Listener())
        assert result.outcome is Outcome.SUCCESS, result
        entries = read_transcript(made.artifacts / "transcript.jsonl")
        said = "\n".join(entry.text for entry in entries if entry.type == "output")
        assert f"<{config.model}>" in said
        assert prompt in said or f"<{task.prompt_path}>" in said
        assert (await made.sh("test -e pwned")).exit_code == 1
        if name == "mini-swe-agent":
            assert result.turns == 2
