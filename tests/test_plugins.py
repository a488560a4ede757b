"""Providers and agents of other packages are found by entry point and run like our own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.test_cli import cli, run_json

PLUGIN = """
from pathlib import Path

from sandbox_pipeline.errors import FailureClass
from sandbox_pipeline.records import AgentResult, Outcome, Usage
from sandbox_pipeline.sandboxes.base import WORKSPACE, Command, ProviderHost
from sandbox_pipeline.sandboxes.local import LocalProvider


class ShoutAgent:
    kind = "shout"
    network = "none"

    def __init__(self, script="true", *, fails=False):
        self.script, self.fails = script, fails

    def validate(self, config, environ, *, provider):
        assert provider in ("boxed", "local")

    def mounts(self, config, environ):
        return {}

    async def run(self, sandbox, task, reporter):
        await reporter.progress("shouting")
        await sandbox.run(Command(["sh", "-c", self.script], cwd=WORKSPACE))
        if self.fails:
            failed = {"outcome": Outcome.FAILED, "failure_class": FailureClass.AGENT_FAILED}
            return AgentResult(**failed, message="hoarse")
        await sandbox.write(f"{WORKSPACE}/SHOUT.txt", task.prompt.upper().encode() + b"\\n")
        usage = Usage(input_tokens=1, output_tokens=2)
        return AgentResult(outcome=Outcome.SUCCESS, message="shouted", turns=1, usage=usage)


class BoxedProvider(LocalProvider):
    name = "boxed"


def boxed(host: ProviderHost) -> BoxedProvider:
    return BoxedProvider(Path(host.home) / "boxes")
"""


def install(folder: Path) -> dict[str, str]:
    """Make a distribution as pip would have; the environment in which it is installed."""
    info = folder / "their_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "their_plugin.py").write_text(PLUGIN, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sandbox_pipeline.agents]\nshout = their_plugin:ShoutAgent\n"
        "[sandbox_pipeline.providers]\nboxed = their_plugin:boxed\n"
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}


def test_third_party_provider_and_agent_are_found_and_run(
    home: Path, repo: Path, tmp_path: Path
) -> None:
    environ = install(tmp_path / "site")
    arguments = ["--agent", "shout", "--provider", "boxed", "--forks", "2"]
    code, result = run_json(repo, *arguments, **environ)
    assert code == 0, result
    for row in result["forks"]:
        assert (row["outcome"], row["provider"], row["agent"]) == ("success", "boxed", "shout")
        assert "+P" in Path(row["patch_path"]).read_text(encoding="utf-8")
        assert (row["input_tokens"], row["cost_usd"]) == (1, None)
    assert list((home / "boxes").glob("local-*")) == []
    assert cli("reap", **environ).returncode == 0


def test_doctor_names_what_is_installed(home: Path, tmp_path: Path) -> None:
    done = cli("doctor", "--json", "--set", "agent.kind=whisper", **install(tmp_path / "site"))
    assert done.returncode == 2
    [check] = [item for item in json.loads(done.stdout) if item["name"] == "agent whisper"]
    assert "anthropic, claude_code, command, shout" in check["finding"]


def test_suites_run_outside_of_this_repository_as_the_docs_say(tmp_path: Path) -> None:
    """A few tests of each; the agent here only follows part of its contract."""
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    [module] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "test_their_plugin.py").write_text(module, encoding="utf-8")
    environ = install(tmp_path / "site")
    chosen = (
        "output_and_exit_code or stdin or snapshot_is_a_base or under_a_lease "
        "or work_is_a_success or failure_is_a_result or says_what_it_needs"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-k", chosen],
        cwd=tmp_path,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b9 passed", done.stdout), done.stdout
