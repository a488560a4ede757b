"""What is wrong with keys, templates and answers of the clouds is told, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandbox_pipeline.conformance.bench import CANARY
from tests.agents.old_claude import OLD_VERSION, old_claude
from tests.conftest import git
from tests.real_runs import wire
from tests.servers.e2b_server import api_error
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
            "no key for the model: set ANTHROPIC_API_KEY in the environment",
        ),
        (
            ["--set", "judge.enabled=true"],
            {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": ""},
            "judge.enabled: no key for the model: set ANTHROPIC_API_KEY",
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


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_key_fails_the_run_by_name_with_all_rows(
    home: Path, tmp_path: Path, status: int
) -> None:
    async with wire(tmp_path, "e2b", "command") as servers:
        assert servers.cloud is not None
        servers.cloud.faults.add(
            api_error(status, "no", method="POST", path="/v2/sandboxes", times=0)
        )
        line = [*servers.arguments("command", forks=3), "--max-concurrent", "1"]
        code, result = await servers.run(*line)
        assert (code, result["run_status"]) == (5, "FAILURE")
        assert [row["failure_class"] for row in result["forks"]] == ["auth"] * 3
        assert "E2B_API_KEY" in json.dumps(result["error"])
        assert len(servers.cloud.ledger.requests("POST", "/v2/sandboxes")) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--forks", "0"], "num_forks: Input should be greater than or equal to 1 (got 0)"),
        (["--forks", "-1"], "num_forks: Input should be greater than or equal to 1 (got -1)"),
        (["--forks", "100000"], "num_forks: Input should be less than or equal to 1000"),
        (["--set", "agent.env_from=[NOT_SET_X]"], "not set in this environment: NOT_SET_X"),
    ],
)
async def test_bad_input_costs_no_request(
    home: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    async with wire(tmp_path, "e2b", "command") as servers:
        assert servers.cloud is not None
        line = ["--repo", str(servers.repo), "--prompt", "p", "--provider", "e2b"]
        code, _, err = await servers.cli("run", *line, "--command", "true", *arguments)
        assert (code, expected in err) == (2, True), err
        assert servers.cloud.ledger.entries() == []


async def test_outdated_claude_code_here_is_refused_before_anything_is_created(
    home: Path, tmp_path: Path
) -> None:
    old = old_claude(tmp_path / "claude")
    expected = f"{old}: Claude Code {OLD_VERSION} is too old, 2.1.197 or newer is needed: "
    async with wire(tmp_path, "local", "claude_code") as servers:
        line = [*servers.arguments("claude_code"), "--set", f"agent.claude_binary={old}"]
        code, _, err = await servers.cli("run", *line)
        assert code == 2, err
        assert " ".join(err.split()).count(f"{expected}claude update, or npm install -g") == 1
        assert "Traceback" not in err
        assert not list(home.glob("sandboxes/*"))
        sets = ["agent.kind=claude_code", "sandbox.provider=local", f"agent.claude_binary={old}"]
        arguments = [word for item in sets for word in ("--set", item)]
        code, out, _ = await servers.cli("doctor", "--json", *arguments)
        assert code == 2
        [check] = [check for check in json.loads(out) if check["name"] == "Claude Code"]
        assert (check["state"], check["finding"].startswith(expected)) == ("failed", True)
        assert "npm install -g @anthropic-ai/claude-code" in check["remedy"]
        assert servers.model.answers == []


async def test_outdated_claude_code_in_the_image_is_a_configuration_error(
    home: Path, tmp_path: Path
) -> None:
    old = old_claude(tmp_path / "claude")
    async with wire(tmp_path, "e2b", "claude_code", claude=old) as servers:
        code, result = await servers.run(*servers.arguments("claude_code", forks=2))
        assert code == 4
        for row in result["forks"]:
            assert row["failure_class"] == "config"
            needed = f"Claude Code {OLD_VERSION} is too old, 2.1.197 or newer is needed"
            assert needed in row["message"]
            assert "sandbox.template" in row["message"]
            assert row["cost_usd"] is None
        assert servers.model.answers == []


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
