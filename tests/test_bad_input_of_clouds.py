"""What is wrong with keys, templates and answers of the clouds is told, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.model_api import CANARY
from tests.conftest import git
from tests.real_runs import wire
from tests.test_cli import cli

NEWLINE_KEY = "canary-first\ncanary-second"


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        (["--provider", "e2b"], {"E2B_API_KEY": ""}, "E2B_API_KEY is not set"),
        (["--provider", "e2b"], {"E2B_API_KEY": NEWLINE_KEY}, "E2B_API_KEY has characters no key"),
        (
            ["--provider", "e2b"],
            {"E2B_API_KEY": "x" * 40, "E2B_DEBUG": "true"},
            "E2B_DEBUG is set",
        ),
        (
            ["--agent", "anthropic"],
            {"ANTHROPIC_API_KEY": NEWLINE_KEY},
            "ANTHROPIC_API_KEY has characters no key has",
        ),
        (
            ["--agent", "anthropic"],
            {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": ""},
            "no key for the model: set one of ANTHROPIC_API_KEY",
        ),
        (
            ["--agent", "anthropic"],
            {"ANTHROPIC_API_KEY": CANARY, "ANTHROPIC_BASE_URL": "ftp://x"},
            "ANTHROPIC_BASE_URL: expected http",
        ),
        (
            ["--agent", "claude_code", "--set", "agent.claude_binary=/nowhere"],
            {"ANTHROPIC_API_KEY": CANARY},
            "agent.claude_binary: /nowhere: no such file; install with npm",
        ),
    ],
)
def test_bad_keys_and_settings_are_one_message(
    home: Path, repo: Path, arguments: list[str], environ: dict[str, str], expected: str
) -> None:
    line = ["--repo", str(repo), "--prompt", "p", "--command", "true", "--provider", "local"]
    done = cli("run", *line, *arguments, **environ)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert "canary-second" not in done.stdout + done.stderr


async def test_missing_template_stops_the_run_and_no_fork_goes_on(
    home: Path, tmp_path: Path
) -> None:
    async with wire(tmp_path, "e2b", "command") as servers:
        line = [*servers.arguments("command", forks=3), "--set", "sandbox.template=no-such"]
        code, result = await servers.run(*line)
        assert code == 5
        assert {row["failure_class"] for row in result["forks"]} == {"config"}
        assert "template 'no-such' not found" in json.dumps(result["error"])
        assert servers.cloud is not None
        assert servers.cloud.ledger.created() == []


@pytest.mark.parametrize(
    ("command", "tokens", "cost"),
    [
        ("""echo '{"type":"step_finish","part":{"cost":-3,"tokens":{"input":-5}}}'""", None, None),
        ("""echo '{"type":"step_finish","part":{}}'""", None, None),
        ("""echo '{"type":"step_finish","part":{"cost":0.5,"tokens":{"input":7}}}'""", 7, 0.5),
        ("head -c 50000000 /dev/zero | tr '\\\\0' '['", None, None),
    ],
    ids=["negative", "missing", "there", "50 MB"],
)
async def test_usage_that_is_none_is_unknown(
    home: Path, tmp_path: Path, command: str, tokens: int | None, cost: float | None
) -> None:
    async with wire(tmp_path, "local", "anthropic") as servers:
        script = servers.repo / "say.sh"
        script.write_text(f"{command}\n", encoding="utf-8")
        agent = "sh say.sh"
        line = ["--repo", str(servers.repo), "--prompt", "p", "--provider", "local"]
        line += ["--forks", "1", "--set", "agent.usage_format=opencode-jsonl"]
        git(servers.repo, "add", "--all")
        git(servers.repo, "commit", "--quiet", "--message=say")
        code, result = await servers.run(*line, "--command", agent)
        [row] = result["forks"]
        assert (code, row["outcome"]) == (0, "success"), row
        assert (row["input_tokens"], row["cost_usd"]) == (tokens, cost)
        assert row["cost_basis"] == ("unknown" if cost is None else "reported")
