"""Deciding on the command line: ranking, diff, patch, apply, compare, report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.workspace.branch import commit_patch
from tests.conftest import GIT_ENV, git, make_repo
from tests.test_cli import cli

CHANGE = "sh -c 'echo {fork_num} > made; test {fork_num} != 2 || echo 0 > made'"


@pytest.fixture
def results(home: Path, repo: Path) -> None:
    for name, verify in (("one", "grep -qx 0 made"), ("two", "test -f made")):
        done = cli("run", "--repo", str(repo), "--prompt", "make [it] so", "--forks", "3",
                   "--workflow-id", name, "--command", CHANGE, "--json",
                   "--set", f"verify_command={verify}", "--set", "ranking.time=0")  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_path_from_ranking_to_a_branch(results: None, repo: Path, home: Path) -> None:
    shown = json.loads(cli("show", "one", "--json").stdout)
    assert [(row["place"], row["fork_num"]) for row in shown["ranking"]] == [(1, 0), (1, 2), (2, 1)]
    assert shown["winner"] == 0
    text = cli("show", "one").stdout
    assert "Fork 0 wins: verified" in text
    assert "the same change as fork 0" in text
    assert "rejected: verify_command exited with 1" in text

    assert "made the same change" in cli("diff", "0", "2", "--workflow", "one").stdout
    assert "-+0\n++1" in cli("diff", "0", "1", "--workflow", "one").stdout

    patch = cli("patch", "1", "--workflow", "one").stdout
    stored = Path(str(shown["forks"][1]["patch_path"])).read_text(encoding="utf-8")
    assert patch == stored

    mine = repo / "mine.txt"
    mine.write_text("not committed", encoding="utf-8")
    (repo / "staged.txt").write_text("staged", encoding="utf-8")
    git(repo, "add", "staged.txt")
    before = (git(repo, "status", "--porcelain"), git(repo, "rev-parse", "HEAD"))
    subfolder = repo / "sub"
    subfolder.mkdir()
    arguments = ["apply", "0", "--workflow", "one", "--repo", str(subfolder)]
    done = cli(*arguments, **GIT_ENV)
    assert done.returncode == 0, done.stderr
    assert (git(repo, "status", "--porcelain"), git(repo, "rev-parse", "HEAD")) == before
    assert git(repo, "show", "forks/one/0:made") == "0"
    assert git(repo, "rev-parse", "forks/one/0^") == before[1]
    again = cli(*arguments, **GIT_ENV)
    assert (again.returncode, "'forks/one/0' exists" in again.stderr) == (2, True)

    sides = json.loads(cli("compare", "one", "two", "--json").stdout)
    assert [(side["passed"], side["forks"]) for side in sides] == [(2, 3), (3, 3)]
    assert sides[0]["low"] < 2 / 3 < sides[0]["high"]
    [side] = json.loads(cli("compare", "one", "two", "--by", "prompt", "--json").stdout)
    assert (side["name"], side["passed"], side["forks"]) == ("make [it] so", 5, 6)
    assert "83%" in cli("compare", "one", "two", "--by", "prompt").stdout

    [side] = json.loads(cli("compare", "--last", "9", "--json").stdout)
    assert (side["name"], side["passed"], side["forks"]) == (f"sonnet, {str(repo)[-80:]}", 5, 6)
    sides = json.loads(cli("compare", "--last", "1", "--by", "agent", "--by", "month",
                           "--json").stdout)  # fmt: skip
    assert [(side["name"][:11], side["forks"]) for side in sides] == [("command, 20", 3)]

    written = home / "artifacts" / "one" / "report.html"
    assert written.exists(), "made at completion"
    written.unlink()
    assert cli("report", "one").stdout.strip() == str(written)
    assert written.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "7"], "fork: 7 is not one of 0 to 0"),
        (["patch", "0"], "fork 0 left no patch"),
        (["apply", "0"], "fork 0 left no patch"),
        (["diff", "0", "-1"], "No such option"),
        (["compare"], "WORKFLOW: name orchestrations to compare, or give --last N"),
        (["compare", "nope", "--last", "3"], "one of the two"),
        (["compare", "--last", "0"], "Invalid value"),
        (["compare", "nope"], "no orchestration 'nope'"),
        (["report", "nope"], "no orchestration 'nope'"),
    ],
)
def test_bad_usage_is_one_message(
    home: Path, repo: Path, arguments: list[str], message: str
) -> None:
    if arguments[0] not in ("compare", "report") and not message.startswith("No such"):
        cli("run", "--repo", str(repo), "--prompt", "p", "--forks", "1", "--command", "true")
    done = cli(*arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_branch_needs_a_repository_with_the_base_and_a_patch_that_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in GIT_ENV.items():
        monkeypatch.setenv(name, value)
    repo = make_repo(tmp_path / "r")
    head = git(repo, "rev-parse", "HEAD")
    patch = tmp_path / "p.diff"
    patch.write_text("nonsense", encoding="utf-8")
    with pytest.raises(ConfigError, match="git apply failed"):
        commit_patch(repo, "b", head, patch, "m")
    with pytest.raises(ConfigError, match="git fetch it first"):
        commit_patch(repo, "b", "1" * 40, patch, "m")
    with pytest.raises(ConfigError, match="not a valid branch name"):
        commit_patch(repo, "--force", head, patch, "m")
    with pytest.raises(ConfigError, match="not in a git repository"):
        commit_patch(tmp_path, "b", head, patch, "m")
    assert git(repo, "branch", "--list", "b") == ""
    subprocess.run(["git", "fsck", "--strict"], cwd=repo, check=True, capture_output=True)
