"""The command line, as its own process, on a deployment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.processes import live_sandboxes, started, wait_until_gone

CLI = [sys.executable, "-m", "sandbox_pipeline"]
SLOW_AGENT = "sh -c 'trap : TERM; echo half > work; sleep 120'"


def cli(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def run_json(repo: Path, *arguments: str, **environ: str) -> tuple[int, dict[str, Any]]:
    done = cli("run", "--repo", str(repo), "--prompt", "p", "--json", *arguments, **environ)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_demo_has_its_three_outcomes_and_names_every_place(home: Path) -> None:
    done = cli("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "As expected: fork 0 solved the task" in done.stdout
    assert "sandbox-created" in done.stdout, "plain progress lines where there is no terminal"
    assert "/runs/" in done.stdout
    shown = json.loads(cli("show", "--json").stdout)
    outcomes = [(f["outcome"], f["failure_class"], f["exit_code"]) for f in shown["forks"]]
    assert outcomes == [
        ("success", None, 0),
        ("failed", "agent_failed", 1),
        ("failed", "agent_failed", 134),
    ]
    patches = {Path(fork["patch_path"]).read_text(encoding="utf-8") for fork in shown["forks"]}
    assert len(patches) == 3
    workflow = shown["workflow_id"]

    assert "all tests pass" in cli("show", workflow, "--fork", "0").stdout
    timeline = [json.loads(line) for line in cli("events", "--json").stdout.splitlines()]
    assert timeline[0]["name"] == "orchestration-requested"
    assert timeline[-1]["name"] == "orchestration-completed"
    assert "orchestration-completed" in cli("events", workflow).stdout

    csv = home / "forks.csv"
    assert cli("export", "--output", str(csv)).returncode == 0
    assert list(pd.read_csv(csv)["outcome"]) == ["success", "failed", "failed"]
    parquet = home / "all.parquet"
    cli(
        "export",
        "--table",
        "orchestration_summary",
        "--format",
        "parquet",
        "--output",
        str(parquet),
    )
    assert pd.read_parquet(parquet)["succeeded"].tolist() == [1]
    lines = cli("export", "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["fork_num"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(("executor", "forks", "width"), [("async", 20, 5), ("multiprocess", 4, 2)])
def test_never_more_than_max_concurrent_sandboxes_by_their_processes(
    home: Path, repo: Path, executor: str, forks: int, width: int
) -> None:
    """Counted by the machine's processes, under both executors, with the same results.

    Dagster's own executor starts a process for each of a fork's seven ops, so fewer have to do.
    """
    with started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", str(forks),
         "--max-concurrent", str(width), "--command", "sh -c 'sleep 0.3; echo {fork_num} > made'",
         "--set", "rate_limit.starts=50", "--json"],
        env={**os.environ, "SANDBOX_PIPELINE_EXECUTOR": executor,
             "DAGSTER_MULTIPROCESS_EXECUTOR_MAX_CONCURRENT": "4"},
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        most = 0
        while process.poll() is None:
            most = max(most, len(live_sandboxes(home)))
            time.sleep(0.02)
        output, _ = process.communicate()
    assert process.returncode == 0, output
    result = json.loads(output)
    assert [fork["outcome"] for fork in result["forks"]] == ["success"] * forks
    assert [fork["insertions"] for fork in result["forks"]] == [1] * forks
    assert 1 <= most <= width
    if executor == "async":
        assert most == width


def test_ctrl_c_cancels_cleans_up_and_says_so(home: Path, repo: Path) -> None:
    with started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", "4", "--max-concurrent",
         "2", "--workflow-id", "stopped", "--command", SLOW_AGENT],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        _wait_for_agents(home, 2)
        _wait_for_work(home, 2)
        os.killpg(process.pid, signal.SIGINT)
        assert wait_until_gone(home, 10) == []
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    assert out.count("cancelled") >= 4
    assert _status_of_latest_run() == "CANCELED"
    forks = json.loads(cli("show", "stopped", "--json").stdout)["forks"]
    assert sorted(fork["insertions"] or 0 for fork in forks) == [0, 0, 1, 1], "what they had done"


@pytest.mark.parametrize("executor", ["async", "multiprocess"])
def test_cancel_from_another_process(home: Path, repo: Path, executor: str) -> None:
    with started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", "3", "--max-concurrent",
         "2", "--workflow-id", "stopped", "--command", SLOW_AGENT, "--json"],
        env={**os.environ, "SANDBOX_PIPELINE_EXECUTOR": executor},
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        _wait_for_agents(home, 2)
        _wait_for_work(home, 2)
        done = cli("cancel", "stopped")
        assert done.returncode == 0, done.stderr
        assert "no sandbox is left" in done.stdout
        assert live_sandboxes(home) == []
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    result = json.loads(out)
    assert result["run_status"] == "CANCELED"
    assert {fork["outcome"] for fork in result["forks"]} == {"cancelled"}
    insertions = sorted(fork["insertions"] or 0 for fork in result["forks"])
    assert insertions == [0, 1, 1], "what they had done is kept"
    assert "nothing to cancel" in cli("cancel", "stopped").stdout


def test_sigkill_in_the_middle_then_again_keeps_results_and_runs_no_agent_twice(
    home: Path, repo: Path, tmp_path: Path
) -> None:
    """Fork 0 is done, 1 and 2 are at work and are re-attached to, 3 never started."""
    agent = "sh -c 'echo ran >> ../ran; test {fork_num} = 0 || sleep 6; cp ../ran made'"
    arguments = ["run", "--repo", str(repo), "--prompt", "p", "--forks", "4", "--max-concurrent",
                 "2", "--workflow-id", "again", "--command", agent, "--json"]  # fmt: skip
    with started([*CLI, *arguments], stdout=subprocess.DEVNULL):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            shown = cli("show", "again", "--json")
            forks: list[Any] = json.loads(shown.stdout)["forks"] if shown.stdout else []
            stages = [fork["outcome"] for fork in forks]
            if stages[:1] == ["success"] and stages.count("running") == 2 == _agents_started():
                break
            time.sleep(0.1)
    before = set(live_sandboxes(home))
    assert len(before) == 2
    done = cli(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    forks = json.loads(done.stdout)["forks"]
    assert [fork["outcome"] for fork in forks] == ["success"] * 4
    assert [fork["insertions"] for fork in forks] == [1] * 4, "one line for each run of the agent"
    assert before <= {fork["sandbox_id"] for fork in forks}
    assert [fork["agent_attempts"] for fork in forks] == [1] * 4


def test_sandboxes_of_a_killed_worker_end_by_their_own_deadline(home: Path, repo: Path) -> None:
    with started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", "2", "--command",
         SLOW_AGENT, "--set", "sandbox.orphan_grace_seconds=10"],
        stdout=subprocess.DEVNULL,
    ):  # fmt: skip
        _wait_for_agents(home, 2)
    assert len(live_sandboxes(home)) == 2, "time to resume"
    assert wait_until_gone(home, 15) == []


@pytest.mark.parametrize(
    ("command", "agent_code", "insertions", "message"),
    [
        ("no-such-agent x", 127, 0, "command not found in the sandbox: no-such-agent"),
        ("true", 0, 0, "the agent changed nothing."),
        ("sh -c 'echo half > half; exit 1'", 1, 1, "the agent exited with code 1"),
        ("sh -c 'echo half > half; exit 137'", 137, 1, "killed by signal 9"),
        ("sh -c 'echo half > half; kill -9 $$'", 137, 1, "killed by signal 9"),
        ("sh -c 'echo half > half; kill -SEGV $$'", 139, 1, "killed by signal 11"),
        ("sh -c 'echo why >&2; exit 7'", 7, 0, "the agent exited with code 7: why"),
    ],
)
def test_what_an_agent_may_do(
    home: Path, repo: Path, command: str, agent_code: int, insertions: int, message: str
) -> None:
    code, result = run_json(repo, "--forks", "1", "--command", command)
    [fork] = result["forks"]
    assert (code, fork["outcome"]) == ((4, "failed") if agent_code else (0, "success")), fork
    assert fork["failure_class"] == ("agent_failed" if agent_code else None)
    assert (fork["exit_code"], fork["insertions"]) == (agent_code, insertions)
    assert message in fork["message"]


def test_an_agent_that_does_not_stop_is_a_timeout_and_keeps_its_patch(
    home: Path, repo: Path
) -> None:
    agent = "sh -c 'trap : INT TERM; echo half > work; while :; do sleep 1; done'"
    code, result = run_json(repo, "--forks", "1", "--command", agent, "--timeout", "1")
    [fork] = result["forks"]
    assert (code, fork["outcome"]) == (4, "timeout")
    assert fork["insertions"] == 1
    assert fork["agent_seconds"] >= 1


def test_output_is_capped_and_may_be_any_bytes(home: Path, repo: Path) -> None:
    agent = (
        r"sh -c 'printf \"\\377\\376 caf\\351\\n\"; "
        r"head -c 200000000 /dev/zero | tr \"\\0\" x; echo; echo end >&2'"
    ).replace('\\"', '"')
    code, result = run_json(
        repo, "--forks", "1", "--command", agent, "--set", "agent.max_output_mb=3"
    )
    [fork] = result["forks"]
    assert (code, fork["outcome"], fork["output_truncated"]) == (0, "success", True)
    log = Path(fork["transcript_path"]).parent / "stdout.log"
    assert log.stat().st_size == 3_000_000
    assert log.read_bytes().startswith(b"\xff\xfe caf\xe9\n")


@pytest.mark.parametrize(
    "prompt",
    [
        "-leading",
        "a 'quote' \"double\" `tick` $(touch /tmp/x) \\ \n\nlines\r\n\ttab",
        "é" * 100_000,
    ],
)
def test_the_prompt_arrives_byte_for_byte(
    home: Path, repo: Path, tmp_path: Path, prompt: str
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(prompt.encode())
    done = cli("run", "--repo", str(repo), "--prompt-file", str(path), "--forks", "1", "--json",
               "--command", "sh -c 'sha256sum < {prompt_file} > sum'")  # fmt: skip
    assert done.returncode == 0
    [fork] = json.loads(done.stdout)["forks"]
    patch = Path(fork["patch_path"]).read_text(encoding="utf-8")
    assert f"+{hashlib.sha256(prompt.encode()).hexdigest()}  -" in patch


def test_a_secret_that_the_agent_prints_is_nowhere(home: Path, repo: Path) -> None:
    import base64

    canary = "canary-7f3a9d2e51c8"
    agent = (
        "sh -c 'echo $MY_KEY; echo $MY_KEY >&2; echo k=$MY_KEY > leak.txt; "
        "printf %s $MY_KEY | base64; exit 3'"
    )
    code, result = run_json(
        repo, "--forks", "1", "--command", agent, "--set", "agent.env_from=[MY_KEY]", MY_KEY=canary
    )
    [fork] = result["forks"]
    assert (code, fork["secret_leak"]) == (4, True)
    assert canary not in json.dumps(result)
    needles = [canary.encode(), base64.b64encode(canary.encode()).rstrip(b"=")]
    for path in home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(needle in content for needle in needles), path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--repo", "/no/such"], "repo_url: no such folder: /no/such"),
        (["--forks", "0"], "num_forks: Input should be greater than or equal to 1 (got 0)"),
        (["--forks", "100000"], "less than or equal to 1000"),
        (["--branch", "--upload-pack"], "branch: '--upload-pack' is not a valid branch name"),
        (["--branch", "nope"], "has no branch 'nope'; it has: main"),
        (["--workflow-id", "A B"], "workflow_id: must be 1 to 63"),
        (["--agent", "nonsense"], "agent.kind: 'nonsense' is not installed; there are: "),
        (["--provider", "nonsense"], "sandbox.provider: 'nonsense' is not installed"),
        (["--set", "agent.env_from=[NOT_SET_X]"], "not set in this environment: NOT_SET_X"),
        (["--set", "nonsense"], "--set: 'nonsense' is not FIELD=VALUE"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: no such file"),
        (["--prompt-file", "/no/such"], "--prompt-file: /no/such: No such file"),
        (["--prompt", ""], "prompt: String should have at least 1 character"),
        (["--forks", "-1"], "num_forks: Input should be greater than or equal to 1 (got -1)"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    home: Path, repo: Path, arguments: list[str], expected: str
) -> None:
    done = cli("run", "--repo", str(repo), "--prompt", "p", "--command", "true", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(home.glob("sandboxes/*"))


def test_environment_errors_name_the_variable(home: Path) -> None:
    assert "SANDBOX_PIPELINE_PORT: 'x'" in cli("demo", SANDBOX_PIPELINE_PORT="x").stderr
    done = cli("demo", SANDBOX_PIPELINE_EXECUTOR="spark")
    assert (done.returncode, "SANDBOX_PIPELINE_EXECUTOR" in done.stderr) == (2, True)
    done = cli("demo", DAGSTER_HOME="/proc/nonsense")
    assert (done.returncode, "DAGSTER_HOME" in done.stderr) == (2, True)


def test_a_store_that_cannot_be_written_fails_before_the_first_create(home: Path) -> None:
    done = cli("demo", SANDBOX_PIPELINE_DB_URL="sqlite:////proc/nonsense/s.db")
    assert done.returncode == 1
    assert "state store" in done.stderr
    assert not list(home.glob("sandboxes/*"))


def test_doctor_finds_what_is_wrong_and_says_what_helps(home: Path) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stdout
    assert "isolation" in done.stdout
    checks = json.loads(
        cli("doctor", "--json", "--set", "repo_url=/no/such", E2B_API_KEY="has space").stdout
    )
    failed = {check["name"]: check for check in checks if check["state"] == "failed"}
    assert "repository" in failed
    assert "E2B_API_KEY" in failed
    assert all(check["remedy"] for check in failed.values())
    assert "has space" not in json.dumps(checks)


def test_reap_has_nothing_to_do_after_a_clean_run(home: Path, repo: Path) -> None:
    run_json(repo, "--forks", "1", "--command", "true")
    assert "nothing to reap" in cli("reap").stdout


def test_progress_on_a_terminal_is_a_live_table(home: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([*CLI, "demo"], stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    screen = b""
    while process.poll() is None or select.select([leader], [], [], 0.2)[0]:
        if select.select([leader], [], [], 0.2)[0]:
            try:
                screen += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert process.wait() == 0
    assert b"\x1b[" in screen
    assert "run_agent" not in screen.decode(errors="replace")
    assert "agent" in screen.decode(errors="replace")


def test_help_names_every_command_and_exit_code() -> None:
    text = cli("--help").stdout
    for word in ("demo", "doctor", "export", "130", "bad configuration"):
        assert word in text
    assert "Examples:" in cli("run", "--help").stdout


def _wait_for_agents(home: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while _agents_started() < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(live_sandboxes(home)) == count


def _wait_for_work(home: Path, count: int) -> None:
    """Until so many agents have written their file."""
    deadline = time.monotonic() + 200
    while len(list(home.glob("sandboxes/*/home/*/work"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _agents_started() -> int:
    """Agents at work in the latest orchestration, by its records."""
    shown = cli("show", "--json")
    if not shown.stdout:
        return 0
    forks = json.loads(shown.stdout)["forks"]
    return sum(fork["agent_attempts"] == 1 and fork["outcome"] == "running" for fork in forks)


def _status_of_latest_run() -> str:
    import dagster as dg

    with dg.DagsterInstance.get() as instance:
        return instance.get_runs(limit=1)[0].status.value


def test_the_demo_works_without_isolation_too(home: Path) -> None:
    done = cli("demo", "--isolation", "none")
    assert done.returncode == 0, done.stdout + done.stderr
