"""What every sandbox provider must do; a subclass supplies the fixtures and pytest runs it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.sandboxes.base import (
    HOME,
    STATE_DIR,
    WORKSPACE,
    Command,
    CommandResult,
    Sandbox,
    SandboxProvider,
    SandboxSpec,
)

MakeSpec = Callable[..., SandboxSpec]

_NUMBERS = itertools.count()


def fresh_lease_id() -> str:
    """A lease that no other test has."""
    return f"test-{os.getpid()}-{next(_NUMBERS)}"


def sample_metadata(lease_id: str, **more: str) -> dict[str, str]:
    """The pairs that every sandbox carries."""
    return {
        "app": "sandbox_pipeline",
        "deployment_id": "conformance",
        "workflow_id": "wf",
        "fork_num": "0",
        "attempt": "1",
        "lease_id": lease_id,
        **more,
    }


async def shell(sandbox: Sandbox, script: str, **options: Any) -> CommandResult:
    """Run a script in the sandbox's shell."""
    return await sandbox.run(Command(["sh", "-c", script], **options))


async def wait_until(condition: Callable[[], Awaitable[bool]], *, seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.05)


async def ids(provider: SandboxProvider, metadata: Mapping[str, str]) -> set[str]:
    """The sandboxes that the provider lists."""
    return {info.sandbox_id for info in await provider.list(metadata)}


async def assert_gone(sandbox: Sandbox) -> None:
    """The sandbox says of itself that it is no more."""
    with pytest.raises(ProviderError) as caught:
        await sandbox.run(Command(["true"]))
    assert caught.value.kind is ErrorKind.GONE


class ProviderConformance:
    """The contract of `SandboxProvider` and `Sandbox`, as tests.

    A subclass supplies the fixtures `provider`, `another_provider` (the same deployment, as
    another process would have it) and `make_spec` (a `SandboxSpec` with these changes).
    """

    shortest_ttl_seconds = 1.0
    can_snapshot = True

    @pytest.fixture
    async def sandbox(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> AsyncIterator[Sandbox]:
        made = await provider.create(make_spec())
        yield made
        await provider.kill(made.sandbox_id)

    async def test_output_and_exit_code_come_back(self, sandbox: Sandbox) -> None:
        result = await shell(sandbox, "echo out; echo err >&2; exit 3")
        assert result == CommandResult(exit_code=3, stdout=b"out\n", stderr=b"err\n")

    async def test_missing_program_is_exit_code_127(self, sandbox: Sandbox) -> None:
        result = await sandbox.run(Command(["no-such-program-anywhere"]))
        assert result.exit_code == 127

    async def test_death_by_signal_is_reported_as_a_shell_does(self, sandbox: Sandbox) -> None:
        result = await shell(sandbox, "kill -9 $$")
        assert result.exit_code == 137

    async def test_arguments_are_not_given_to_a_shell(self, sandbox: Sandbox) -> None:
        words = ["a b", "$HOME", "`id`", "'\"", "*", "", "-n", "\n", "ünï→"]
        result = await sandbox.run(Command(["printf", "[%s]", *words]))
        assert result.stdout.decode() == "".join(f"[{word}]" for word in words)

    async def test_stdin_is_given_and_ends(self, sandbox: Sandbox) -> None:
        data = bytes(range(256)) * 4096
        result = await sandbox.run(Command(["cat"], stdin=data, max_output_bytes=2_000_000))
        assert result.stdout == data
        assert not result.truncated

    async def test_stdin_that_nobody_reads_does_no_harm(self, sandbox: Sandbox) -> None:
        result = await sandbox.run(Command(["true"], stdin=b"x" * 1_000_000))
        assert result.exit_code == 0

    async def test_no_stdin_is_an_empty_one(self, sandbox: Sandbox) -> None:
        result = await sandbox.run(Command(["cat"], timeout_seconds=20))
        assert (result.exit_code, result.stdout) == (0, b"")

    async def test_environment_is_added_to_the_sandboxs_own(self, sandbox: Sandbox) -> None:
        env = {"ONE": "1 2", "TWO": "ü\n"}
        result = await shell(sandbox, 'printf "%s|%s|%s" "$ONE" "$TWO" "${PATH:+set}"', env=env)
        assert result.stdout.decode() == "1 2|ü\n|set"

    async def test_environment_does_not_stay(self, sandbox: Sandbox) -> None:
        await shell(sandbox, "true", env={"ONE": "1"})
        result = await shell(sandbox, 'printf "%s" "${ONE:-unset}"')
        assert result.stdout == b"unset"

    async def test_working_folder_is_as_told(self, sandbox: Sandbox) -> None:
        await shell(sandbox, "touch $HOME/workspace/here")
        result = await sandbox.run(Command(["ls"], cwd=WORKSPACE))
        assert result.stdout == b"here\n"

    async def test_missing_working_folder_is_a_failing_command(self, sandbox: Sandbox) -> None:
        result = await sandbox.run(Command(["true"], cwd=f"{HOME}/nowhere"))
        assert result.exit_code != 0

    async def test_home_has_the_folders_of_the_contract(self, sandbox: Sandbox) -> None:
        for folder in (HOME, WORKSPACE, STATE_DIR):
            result = await sandbox.run(Command(["sh", "-c", "touch file && rm file"], cwd=folder))
            assert result.exit_code == 0, folder

    async def test_timeout_ends_the_command_and_what_it_started(self, sandbox: Sandbox) -> None:
        script = "echo before; (sleep 3; touch $HOME/late) & sleep 30"
        begin = time.monotonic()
        result = await shell(sandbox, script, timeout_seconds=1)
        assert time.monotonic() - begin < 10
        assert (result.exit_code, result.timed_out, result.stdout) == (124, True, b"before\n")
        await asyncio.sleep(3)
        with pytest.raises(FileNotFoundError):
            await sandbox.read(f"{HOME}/late")

    async def test_ignored_signals_do_not_prolong_a_timeout(self, sandbox: Sandbox) -> None:
        script = "trap '' INT TERM HUP; sleep 30; sleep 30"
        begin = time.monotonic()
        result = await shell(sandbox, script, timeout_seconds=0.5)
        assert result.timed_out
        assert time.monotonic() - begin < 10

    async def test_background_process_lives_on(self, sandbox: Sandbox) -> None:
        script = "nohup setsid sh -c 'sleep 1; echo done > $HOME/late' </dev/null >/dev/null 2>&1 &"
        assert (await shell(sandbox, script)).exit_code == 0

        async def written() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return await sandbox.read(f"{HOME}/late") == b"done\n"
            return False

        await wait_until(written)

    async def test_run_returns_while_a_background_process_holds_its_output(
        self, sandbox: Sandbox
    ) -> None:
        begin = time.monotonic()
        result = await shell(sandbox, "sleep 30 & echo started", timeout_seconds=60)
        assert time.monotonic() - begin < 10
        assert (result.exit_code, result.stdout, result.timed_out) == (0, b"started\n", False)

    async def test_large_output_is_cut_and_flagged(self, sandbox: Sandbox) -> None:
        script = "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 5"
        result = await shell(sandbox, script, max_output_bytes=100_000)
        assert (len(result.stdout), len(result.stderr)) == (100_000, 100_000)
        assert (result.exit_code, result.truncated) == (5, True)

    async def test_output_of_exactly_the_bound_is_whole(self, sandbox: Sandbox) -> None:
        result = await shell(sandbox, "head -c 1000 /dev/zero", max_output_bytes=1000)
        assert (len(result.stdout), result.truncated) == (1000, False)

    async def test_files_are_written_whole_and_read_by_part(self, sandbox: Sandbox) -> None:
        data = os.urandom(1_500_000)
        path = f"{HOME}/new/deep/file.bin"
        await sandbox.write(path, data)
        assert await sandbox.read(path, max_bytes=2_000_000) == data
        assert await sandbox.read(path) == data[:1_000_000]
        assert await sandbox.read(path, offset=1_499_990, max_bytes=100) == data[-10:]
        assert await sandbox.read(path, offset=1_500_000) == b""
        assert await sandbox.read(path, offset=9_999_999) == b""

    async def test_write_replaces_and_leaves_nothing_beside(self, sandbox: Sandbox) -> None:
        for text in (b"first, longer", b"second", b""):
            await sandbox.write(f"{WORKSPACE}/file", text)
            assert await sandbox.read(f"{WORKSPACE}/file") == text
        listing = await sandbox.run(Command(["ls", "-A"], cwd=WORKSPACE))
        assert listing.stdout == b"file\n"

    async def test_reading_a_missing_file_is_file_not_found(self, sandbox: Sandbox) -> None:
        for path in (f"{HOME}/nowhere", f"{HOME}/no/where"):
            with pytest.raises(FileNotFoundError):
                await sandbox.read(path)

    async def test_file_names_may_be_anything(self, sandbox: Sandbox) -> None:
        for name in ("-rf", "a b", "ünï→😀", "new\nline", "'\"$(id)`", "*"):
            await sandbox.write(f"{WORKSPACE}/{name}", name.encode())
            assert await sandbox.read(f"{WORKSPACE}/{name}") == name.encode()
            seen = await sandbox.run(Command(["cat", f"{WORKSPACE}/{name}"]))
            assert seen.stdout == name.encode()

    async def test_commands_run_beside_each_other(self, sandbox: Sandbox) -> None:
        begin = time.monotonic()
        results = await asyncio.gather(
            *(shell(sandbox, f"sleep 1; echo {number}") for number in range(4))
        )
        assert [result.stdout for result in results] == [b"0\n", b"1\n", b"2\n", b"3\n"]
        assert time.monotonic() - begin < 3.5

    async def test_resources_are_told_or_unknown(self, sandbox: Sandbox) -> None:
        await shell(sandbox, "head -c 2000000 /dev/urandom > $HOME/file")
        used = await sandbox.resources()
        assert used.cpu_seconds is None or 0 <= used.cpu_seconds < 60
        assert used.peak_memory_bytes is None or used.peak_memory_bytes > 0
        assert used.disk_bytes is None or used.disk_bytes >= 2_000_000

    async def test_two_sandboxes_know_nothing_of_each_other(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        one, two = await asyncio.gather(provider.create(make_spec()), provider.create(make_spec()))
        assert one.sandbox_id != two.sandbox_id
        await one.write(f"{HOME}/file", b"one")
        with pytest.raises(FileNotFoundError):
            await two.read(f"{HOME}/file")
        await provider.kill(one.sandbox_id)
        assert (await shell(two, "true")).exit_code == 0
        await provider.kill(two.sandbox_id)

    async def test_list_finds_by_metadata(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        lease_id = fresh_lease_id()
        metadata = sample_metadata(lease_id, workflow_id="another")
        made = await provider.create(make_spec(lease_id=lease_id, metadata=metadata))
        assert await ids(provider, {"lease_id": lease_id}) == {made.sandbox_id}
        assert made.sandbox_id in await ids(provider, {"workflow_id": "another"})
        assert made.sandbox_id in await ids(provider, {})
        assert await ids(provider, {"lease_id": lease_id, "workflow_id": "wf"}) == set()
        assert await ids(provider, {"lease_id": lease_id, "nothing": "here"}) == set()
        info = (await provider.list({"lease_id": lease_id}))[0]
        assert info.metadata.items() >= metadata.items()
        await provider.kill(made.sandbox_id)
        assert await ids(provider, {"lease_id": lease_id}) == set()

    async def test_another_provider_connects(
        self,
        provider: SandboxProvider,
        another_provider: SandboxProvider,
        make_spec: MakeSpec,
    ) -> None:
        made = await provider.create(make_spec())
        await made.write(f"{HOME}/file", b"content")
        await provider.close()
        same = await another_provider.connect(made.sandbox_id)
        assert same.sandbox_id == made.sandbox_id
        assert await same.read(f"{HOME}/file") == b"content"
        assert await another_provider.kill(made.sandbox_id)
        await assert_gone(made)

    async def test_second_kill_is_not_an_error(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        made = await provider.create(make_spec())
        assert await provider.kill(made.sandbox_id) is True
        assert await provider.kill(made.sandbox_id) is False

    async def test_killed_sandbox_is_gone_for_every_operation(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        made = await provider.create(make_spec())
        await provider.kill(made.sandbox_id)
        operations: list[Awaitable[Any]] = [
            made.run(Command(["true"])),
            made.read(f"{HOME}/file"),
            made.write(f"{HOME}/file", b""),
            made.extend(60),
            made.resources(),
            provider.connect(made.sandbox_id),
        ]
        for operation in operations:
            with pytest.raises(ProviderError) as caught:
                await operation
            assert caught.value.kind is ErrorKind.GONE

    async def test_kill_interrupts_a_running_command(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        made = await provider.create(make_spec())
        running = asyncio.create_task(shell(made, "sleep 60", timeout_seconds=90))
        await asyncio.sleep(0.3)
        begin = time.monotonic()
        await provider.kill(made.sandbox_id)
        with pytest.raises(ProviderError) as caught:
            await running
        assert caught.value.kind is ErrorKind.GONE
        assert time.monotonic() - begin < 15

    async def test_time_to_live_ends_a_sandbox(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        lease_id = fresh_lease_id()
        made = await provider.create(
            make_spec(lease_id=lease_id, ttl_seconds=self.shortest_ttl_seconds)
        )

        async def unlisted() -> bool:
            return not await ids(provider, {"lease_id": lease_id})

        await wait_until(unlisted, seconds=self.shortest_ttl_seconds + 10)
        await assert_gone(made)
        assert await provider.kill(made.sandbox_id) is False

    async def test_extending_prolongs_and_never_shortens(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        made = await provider.create(make_spec(ttl_seconds=self.shortest_ttl_seconds + 1))
        await made.extend(60)
        await made.extend(0.1)
        await asyncio.sleep(self.shortest_ttl_seconds + 2)
        assert (await shell(made, "true")).exit_code == 0
        await provider.kill(made.sandbox_id)

    async def test_snapshot_is_a_base_for_others(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        prepared = await provider.create(make_spec())
        script = "mkdir -p a/b; echo text > a/b/file; chmod 741 a/b/file; ln -s b/file a/link"
        assert (await shell(prepared, script, cwd=WORKSPACE)).exit_code == 0
        if not self.can_snapshot:
            with pytest.raises(ProviderError) as caught:
                await provider.snapshot(prepared)
            assert caught.value.kind is ErrorKind.INVALID
            await provider.kill(prepared.sandbox_id)
            return
        base = await provider.snapshot(prepared)
        await assert_gone(prepared)
        assert await provider.kill(prepared.sandbox_id) is False
        copies = [await provider.create(make_spec(base=base)) for _ in range(2)]
        await copies[0].write(f"{WORKSPACE}/a/b/file", b"changed")
        assert await copies[1].read(f"{WORKSPACE}/a/link") == b"text\n"
        seen = await shell(copies[1], "stat -c %a a/b/file; readlink a/link", cwd=WORKSPACE)
        assert seen.stdout == b"741\nb/file\n"
        for copy in copies:
            await provider.kill(copy.sandbox_id)

    async def test_unknown_base_is_missing(
        self, provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        lease_id = fresh_lease_id()
        with pytest.raises(ProviderError) as caught:
            await provider.create(make_spec(lease_id=lease_id, base="base-of-nothing"))
        assert caught.value.kind is ErrorKind.MISSING
        assert await ids(provider, {"lease_id": lease_id}) == set()

    async def test_creating_again_under_a_lease_makes_no_second(
        self, provider: SandboxProvider, another_provider: SandboxProvider, make_spec: MakeSpec
    ) -> None:
        spec = make_spec()
        one, two = await asyncio.gather(provider.create(spec), another_provider.create(spec))
        three = await provider.create(spec)
        found = await ids(provider, {"lease_id": spec.lease_id})
        assert found == {one.sandbox_id} == {two.sandbox_id} == {three.sandbox_id}
        await provider.kill(one.sandbox_id)
