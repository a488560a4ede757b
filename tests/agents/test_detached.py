"""A job that is followed by its files: what a hostile or unlucky one may do to its follower."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_pipeline.agents.detached import MAX_RUNNER_BYTES, Finished, Job, run_detached
from sandbox_pipeline.errors import AgentError
from sandbox_pipeline.sandboxes.base import (
    STATE_DIR,
    Command,
    CommandResult,
    Resources,
    Sandbox,
)

JOB = "agent-1"
FOLDER = f"{STATE_DIR}/{JOB}"


class Counted:
    """A sandbox that counts what it is asked."""

    def __init__(self, inner: Sandbox) -> None:
        self.inner = inner
        self.sandbox_id = inner.sandbox_id
        self.runs = 0
        self.reads = 0

    async def run(self, command: Command) -> CommandResult:
        self.runs += 1
        return await self.inner.run(command)

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        self.reads += 1
        return await self.inner.read(path, offset=offset, max_bytes=max_bytes)

    async def write(self, path: str, data: bytes) -> None:
        await self.inner.write(path, data)

    async def extend(self, ttl_seconds: float) -> None:
        await self.inner.extend(ttl_seconds)

    async def resources(self) -> Resources:
        return await self.inner.resources()


@pytest.fixture
def sandbox(local_sandbox: Sandbox) -> Counted:
    return Counted(local_sandbox)


async def follow(
    sandbox: Sandbox, script: str, *, most: int = 1_000_000, timeout: float = 60
) -> tuple[Finished, dict[str, bytes]]:
    heard = {"stdout": b"", "stderr": b""}

    async def hear(stream: str, chunk: bytes) -> None:
        heard[stream] += chunk

    job = Job(["sh", "-c", script], timeout, most)
    return await run_detached(sandbox, JOB, job, hear), heard


async def test_a_silent_job_is_waited_for_in_few_requests(sandbox: Counted) -> None:
    finished, heard = await follow(sandbox, "sleep 3; echo end")
    assert finished.exit_code == 0
    assert heard == {"stdout": b"end\n", "stderr": b""}
    # Once until it is started, once until its end.
    assert sandbox.runs <= 3
    assert sandbox.reads == 1


async def test_followed_by_two_it_runs_once(sandbox: Counted) -> None:
    script = "echo run >> ~/runs; sleep 1; cat ~/runs"
    (one, _), (two, heard) = await asyncio.gather(follow(sandbox, script), follow(sandbox, script))
    assert one.exit_code == two.exit_code == 0
    assert heard["stdout"] == b"run\n"
    again, heard = await follow(sandbox, script)
    assert again.exit_code == 0
    assert heard["stdout"] == b"run\n"


async def test_what_comes_bit_by_bit_is_heard_as_it_comes_by_all_who_follow(
    sandbox: Counted,
) -> None:
    script = "for i in 1 2 3; do echo $i; sleep 1.2; done; printf end"
    chunks: list[list[bytes]] = [[], []]

    async def of(heard: list[bytes]) -> Finished:
        async def hear(_stream: str, chunk: bytes) -> None:
            heard.append(chunk)

        return await run_detached(sandbox, JOB, Job(["sh", "-c", script], 60, 1_000_000), hear)

    await asyncio.gather(*(of(heard) for heard in chunks))
    for heard in chunks:
        assert b"".join(heard) == b"1\n2\n3\nend"
        assert len(heard) >= 3
    late: list[bytes] = []
    await of(late)
    assert b"".join(late) == b"1\n2\n3\nend"


async def test_a_runner_that_is_killed_is_seen(sandbox: Counted) -> None:
    with pytest.raises(AgentError, match="was killed inside the sandbox"):
        # Seen at once, although what it ran goes on.
        await follow(sandbox, f"kill -9 $(cat {FOLDER}/started); sleep 900", timeout=1000)


async def test_who_removes_the_folder_of_its_job_fails_and_is_not_run_again(
    sandbox: Counted,
) -> None:
    with pytest.raises(AgentError, match="is gone from the sandbox"):
        await follow(sandbox, f"echo run >> ~/runs; rm -rf {FOLDER}; sleep 60")
    runs = await sandbox.run(Command(["cat", "/home/user/runs"]))
    assert runs.stdout == b"run\n"


async def test_who_kills_whoever_waits_changes_nothing(sandbox: Counted) -> None:
    # Those that wait for the lock are the only processes called flock.
    script = """
        for stat in /proc/[0-9]*/stat; do
            read -r pid name rest < $stat || continue
            [ "$name" = "(flock)" ] && kill -9 $pid
        done 2> /dev/null
        sleep 1
        echo end
    """
    finished, heard = await follow(sandbox, script)
    assert finished.exit_code == 0
    assert heard["stdout"] == b"end\n"


async def test_what_it_writes_past_the_cap_into_its_own_files_is_not_read(
    sandbox: Counted,
) -> None:
    script = f"echo 1; sleep 1; truncate -s 1T {FOLDER}/stdout; sleep 1; echo 2"
    finished, heard = await follow(sandbox, script, most=1000)
    assert finished.exit_code == 0
    assert len(heard["stdout"]) <= 1000
    assert heard["stdout"].startswith(b"1\n")


@pytest.mark.parametrize("record", ["x", "0 0", "a b c", "0 0 x", "0 0 0 0"])
async def test_an_end_that_it_recorded_itself_is_no_answer(sandbox: Counted, record: str) -> None:
    with pytest.raises(AgentError, match="is unreadable"):
        await follow(sandbox, f"echo '{record}' > {FOLDER}/exit; sleep 30")


async def test_a_command_that_is_too_long_for_the_system_is_refused(sandbox: Counted) -> None:
    with pytest.raises(AgentError, match="put what is long into a file"):
        await follow(sandbox, "x" * MAX_RUNNER_BYTES)
    assert sandbox.runs == 0


async def test_quotes_and_the_home_reach_the_command_as_they_are(sandbox: Counted) -> None:
    finished, heard = await follow(sandbox, """printf '%s|' /home/user "it's" '$home' "a b" """)
    assert finished.exit_code == 0
    assert heard["stdout"] == b"/home/user|it's|$home|a b|"
