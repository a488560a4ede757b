"""The E2B provider over the wire of the real SDK: the contract, and what is its own."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandbox_pipeline.config import SandboxConfig
from sandbox_pipeline.conformance.providers import (
    MakeSpec,
    ProviderConformance,
    assert_gone,
    fresh_lease_id,
    ids,
    sample_metadata,
    shell,
    wait_until,
)
from sandbox_pipeline.errors import ConfigError, ErrorKind, ProviderError
from sandbox_pipeline.sandboxes import e2b_command
from sandbox_pipeline.sandboxes.base import HOME, Command, Resources, Sandbox, SandboxSpec
from sandbox_pipeline.sandboxes.e2b import E2BProvider
from sandbox_pipeline.sandboxes.e2b_prices import (
    PRICES_VARIABLE,
    SandboxPrices,
    prices_from_environ,
)
from tests.servers.e2b_server import API_KEY, E2BServer, Fault, Ledger, Limits


def spec_of(**changes: Any) -> SandboxSpec:
    lease_id = changes.pop("lease_id", None) or fresh_lease_id()
    spec = SandboxSpec(
        lease_id=lease_id,
        metadata=sample_metadata(lease_id),
        ttl_seconds=120,
        network="none",
        config=SandboxConfig.model_validate({}),
    )
    return replace(spec, **changes)


@pytest.fixture
async def server() -> AsyncIterator[E2BServer]:
    async with E2BServer() as running:
        yield running


@pytest.fixture
def provider(server: E2BServer) -> E2BProvider:
    return E2BProvider.from_environ(server.environ)


@pytest.fixture
def another_provider(server: E2BServer) -> E2BProvider:
    return E2BProvider.from_environ(server.environ)


@pytest.fixture
def make_spec() -> MakeSpec:
    return spec_of


class TestConformance(ProviderConformance):
    pass


class TestCommands:
    async def test_long_command_line_goes_by_file(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        words = ["word" * 250] * 200
        expected = hashlib.sha256("".join(words).encode()).hexdigest()
        result = await sandbox.run(
            Command(["sh", "-c", 'printf %s "$@" | sha256sum', "sh", *words])
        )
        assert result.stdout.split()[0].decode() == expected
        left = await shell(sandbox, "ls -A /tmp | grep -c -v '^[.]sandbox-pipeline[.]'")
        assert left.stdout == b"0\n"

    async def test_bytes_that_are_no_text_reach_the_command(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        word = b"\xff\xfe".decode("utf-8", "surrogateescape")
        result = await sandbox.run(Command(["printf", "%s", word]))
        assert result.stdout == b"\xff\xfe"

    @pytest.mark.parametrize("argv", [[], ["echo", "a\0b"]])
    async def test_impossible_command_line_is_a_failing_command(
        self, provider: E2BProvider, argv: list[str]
    ) -> None:
        sandbox = await provider.create(spec_of())
        result = await sandbox.run(Command(argv))
        assert (result.exit_code, result.stdout) == (126, b"")

    async def test_commands_environment_beats_the_login_shells(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        result = await sandbox.run(Command(["/usr/bin/env"], env={"PATH": "/opt/mine"}))
        assert b"PATH=/opt/mine" in result.stdout.splitlines()

    async def test_environment_is_not_on_a_command_line(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        result = await shell(sandbox, script, env={"CANARY": "canary-in-the-mine"})
        assert b"tr" in result.stdout
        assert b"canary-in-the-mine" not in result.stdout

    async def test_no_variable_of_the_wrapper_is_seen(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        result = await sandbox.run(Command(["env"]))
        assert e2b_command.JOB_VARIABLE.encode() not in result.stdout
        assert b"_sp" not in result.stdout

    async def test_noise_of_a_login_profile_is_no_output(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        await sandbox.write(f"{HOME}/.profile", b"echo welcome; echo motd >&2\n")
        assert (await shell(sandbox, "echo mine")).stdout == b"mine\n"

    async def test_profile_that_breaks_the_shell_fails_the_operation(
        self, provider: E2BProvider
    ) -> None:
        sandbox = await provider.create(spec_of())
        await sandbox.write(f"{HOME}/.profile", b"exit 0\n")
        with pytest.raises(ProviderError) as caught:
            await shell(sandbox, "echo mine")
        assert caught.value.kind is ErrorKind.UNAVAILABLE

    async def test_many_small_writes_are_all_kept(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        script = "for number in $(seq 100); do echo $number; sleep 0.001; done"
        result = await shell(sandbox, script, max_output_bytes=1000)
        assert result.stdout == b"".join(b"%d\n" % number for number in range(1, 101))
        assert not result.truncated

    async def test_interrupts_are_not_ignored(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        result = await shell(sandbox, "grep SigIgn /proc/self/status")
        assert int(result.stdout.split()[1], 16) & 0b110 == 0

    async def test_output_is_whole_while_its_pipe_is_held_open(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        script = "sleep 20 & head -c 3000000 /dev/zero; echo end"
        for _ in range(3):
            result = await shell(sandbox, script, max_output_bytes=4_000_000)
            assert len(result.stdout) == 3_000_004
            assert result.stdout.endswith(b"end\n")

    async def test_background_process_that_writes_on_is_not_ended(
        self, provider: E2BProvider
    ) -> None:
        sandbox = await provider.create(spec_of())
        script = "(sleep 0.3; head -c 3000000 /dev/zero; echo >&2; touch $HOME/alive) & echo now"
        assert (await shell(sandbox, script)).stdout == b"now\n"

        async def alive() -> bool:
            return (await shell(sandbox, "test -e $HOME/alive")).exit_code == 0

        await wait_until(alive)

    async def test_nothing_of_the_wrapper_stays(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        sandbox = await provider.create(spec_of())
        before = server.process_count(sandbox.sandbox_id)
        for _ in range(3):
            await shell(sandbox, "echo; sleep 100", timeout_seconds=0.2)
            await shell(sandbox, "head -c 100000 /dev/zero", max_output_bytes=10)

        async def settled() -> bool:
            return server.process_count(sandbox.sandbox_id) == before

        await wait_until(settled)
        left = await shell(sandbox, "ls -A /tmp | wc -l")
        assert left.stdout.strip() == b"1", "its own only"

    async def test_part_of_a_huge_file_is_read_without_the_rest(
        self, provider: E2BProvider
    ) -> None:
        sandbox = await provider.create(spec_of())
        await shell(sandbox, "truncate -s 5G big; printf end >> big")
        assert await sandbox.read(f"{HOME}/big", offset=5 * 2**30 - 1) == b"\0end"

    @pytest.mark.parametrize("make", ["mkdir it", "mkfifo it", "ln -s /dev/zero it"])
    async def test_what_is_no_file_is_not_found(self, provider: E2BProvider, make: str) -> None:
        sandbox = await provider.create(spec_of())
        await shell(sandbox, make)
        with pytest.raises(FileNotFoundError):
            await sandbox.read(f"{HOME}/it")

    async def test_unreadable_file_is_told_from_a_missing_one(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        await shell(sandbox, "echo secret > it; chmod 000 it")
        with pytest.raises(ProviderError, match="Permission denied") as caught:
            await sandbox.read(f"{HOME}/it")
        assert not caught.value.policy.fatal

    async def test_reading_nothing_asks_nobody(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        assert await sandbox.read(f"{HOME}/nowhere", max_bytes=0) == b""

    async def test_dropped_output_takes_no_disk(self, provider: E2BProvider) -> None:
        sandbox = await provider.create(spec_of())
        script = "head -c 300000000 /dev/zero; du -sk /tmp >&2"
        result = await shell(sandbox, script, max_output_bytes=5000)
        assert (len(result.stdout), result.truncated) == (5000, True)
        assert int(result.stderr.split()[0]) < 200

    async def test_no_room_for_the_commands_output_fails_the_operation(
        self, provider: E2BProvider
    ) -> None:
        sandbox = await provider.create(spec_of())
        await shell(sandbox, "chmod 555 /tmp")
        with pytest.raises(ProviderError, match="exited with code 70") as caught:
            await shell(sandbox, "true")
        assert caught.value.kind is ErrorKind.UNAVAILABLE

    def test_answer_that_is_not_the_wrappers_is_refused(self) -> None:
        job = e2b_command.prepare(Command(["true"]))
        for answer in (
            "",
            "junk",
            f"\n{job.token} 0 0\n\n",
            f"\n{job.token} 0 0\n!\n\n{job.token}\n",
        ):
            with pytest.raises(e2b_command.UnreadableAnswerError):
                e2b_command.result(job, answer)


class TestSandboxes:
    async def test_base_without_the_contracts_folders_is_not_used(
        self, provider: E2BProvider
    ) -> None:
        prepared = await provider.create(spec_of())
        await shell(prepared, "rmdir workspace && touch workspace")
        base = await provider.snapshot(prepared)
        with pytest.raises(ProviderError, match="workspace") as caught:
            await provider.create(spec_of(base=base))
        assert caught.value.kind is ErrorKind.AMBIGUOUS, "it exists and has to be ended"

    @pytest.mark.parametrize(("status", "body"), [(200, "[]"), (404, "no such route"), (500, "{")])
    async def test_resources_without_samples_are_unknown(
        self, provider: E2BProvider, server: E2BServer, status: int, body: str
    ) -> None:
        sandbox = await provider.create(spec_of())
        server.faults.add(Fault(path=".*/metrics", status=status, body=body, times=0))
        resources = await sandbox.resources()
        assert resources.usd_per_second == pytest.approx(3.025e-5)
        assert replace(resources, usd_per_second=None) == Resources()

    @pytest.mark.parametrize(
        ("network", "told"),
        [
            ("none", "none"),
            ("model_api", "allow api.anthropic.com deny 0.0.0.0/0"),
            ("full", "full"),
        ],
    )
    async def test_network_is_asked_for(
        self, server: E2BServer, provider: E2BProvider, network: Any, told: str
    ) -> None:
        sandbox = await provider.create(spec_of(network=network))
        assert [entry.network for entry in server.ledger.entries("created")] == [told]
        assert server.request_bodies[-1]["network"]["allowPublicTraffic"] is False
        assert server.request_bodies[-1]["autoPause"] is False
        await provider.kill(sandbox.sandbox_id)

    async def test_lease_is_the_idempotency_key(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        spec = spec_of(config=SandboxConfig.model_validate({"template": "base"}))
        await provider.create(spec)
        entry = server.ledger.entries("created")[0]
        assert (entry.idempotency_key, entry.ttl_seconds) == (spec.lease_id, 120)
        assert entry.metadata == spec.metadata

    async def test_list_reads_all_pages(self, provider: E2BProvider, server: E2BServer) -> None:
        rows = server.add_rows(250, {"app": "a b&c=d/ü", "lease_id": "x"})
        server.add_rows(3, {"app": "another"})
        assert await ids(provider, {"app": "a b&c=d/ü"}) == set(rows)

    async def test_list_reads_small_pages(self) -> None:
        async with E2BServer(limits=Limits(page_size=7)) as server:
            provider = E2BProvider.from_environ(server.environ)
            rows = server.add_rows(120, {"app": "many"})
            assert await ids(provider, {"app": "many"}) == set(rows)
            assert len(server.ledger.requests("GET", "/v2/sandboxes")) == 18

    async def test_twenty_at_once(self, provider: E2BProvider, server: E2BServer) -> None:
        made = await asyncio.gather(*(provider.create(spec_of()) for _ in range(20)))

        async def use(sandbox: Sandbox, number: int) -> bytes:
            await sandbox.write(f"{HOME}/number", str(number).encode())
            return (await shell(sandbox, "cat number")).stdout

        found = await asyncio.gather(*(use(sandbox, n) for n, sandbox in enumerate(made)))
        assert found == [str(number).encode() for number in range(20)]
        assert server.ledger.max_live() == 20
        assert all(await asyncio.gather(*(provider.kill(one.sandbox_id) for one in made)))
        assert server.ledger.live() == []

    async def test_paused_sandbox_is_not_woken_up(
        self, provider: E2BProvider, server: E2BServer
    ) -> None:
        sandbox = await provider.create(spec_of())
        server.pause(sandbox.sandbox_id)
        with pytest.raises(ProviderError) as caught:
            await provider.connect(sandbox.sandbox_id)
        assert caught.value.kind is ErrorKind.GONE
        assert server.ledger.requests("POST", f"/v2/sandboxes/{sandbox.sandbox_id}/connect") == []
        assert await ids(provider, {}) == {sandbox.sandbox_id}, "so that it can be killed"

    async def test_extending_a_connected_sandbox_keeps_what_another_gave_it(
        self, provider: E2BProvider, another_provider: E2BProvider
    ) -> None:
        sandbox = await provider.create(spec_of(ttl_seconds=1000))
        same = await another_provider.connect(sandbox.sandbox_id)
        await same.extend(10)
        [info] = await provider.list({})
        assert info.expires_at is not None
        assert info.expires_at > time.time() + 900

    async def test_clocks_that_differ_do_not_stop_a_heartbeat(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with E2BServer(limits=Limits(max_ttl_seconds=3600)) as server:
            provider = E2BProvider.from_environ(server.environ)
            sandbox = await provider.create(spec_of())
            with monkeypatch.context() as patch:
                behind = time.time() - 7200
                patch.setattr("sandbox_pipeline.sandboxes.e2b.time.time", lambda: behind)
                same = await provider.connect(sandbox.sandbox_id)
            await same.extend(600)
            assert server.ledger.entries("extended")[-1].ttl_seconds == 600

    async def test_vanished_sandbox_is_gone(self, provider: E2BProvider, server: E2BServer) -> None:
        sandbox = await provider.create(spec_of())
        running = asyncio.create_task(shell(sandbox, "sleep 60"))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.vanish, sandbox.sandbox_id)
        with pytest.raises(ProviderError) as caught:
            await running
        assert caught.value.kind is ErrorKind.GONE
        await assert_gone(sandbox)

    async def test_kill_ends_all_processes(self, provider: E2BProvider, server: E2BServer) -> None:
        sandbox = await provider.create(spec_of())
        await shell(sandbox, "setsid nohup sleep 12345.678 >/dev/null 2>&1 &")
        await provider.kill(sandbox.sandbox_id)
        assert server.stray_processes("12345.678") == []


class TestServer:
    async def test_runs_as_a_program_with_a_ledger_for_others(self, tmp_path: Path) -> None:
        ledger_path = tmp_path / "ledger.jsonl"
        program = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.servers.e2b_server", "--ledger", str(ledger_path)),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert program.stdout is not None
        lines = [(await program.stdout.readline()).decode().strip() for _ in range(3)]
        environ = dict(line.split("=", 1) for line in lines)
        provider = E2BProvider.from_environ(environ)
        sandbox = await provider.create(spec_of())
        async with httpx.AsyncClient(base_url=environ["E2B_API_URL"]) as admin:
            rule = {"method": "DELETE", "path": "/sandboxes/.*", "status": 500}
            assert (await admin.post("/admin/faults", json=[rule])).status_code == 204
            with pytest.raises(ProviderError):
                await provider.kill(sandbox.sandbox_id)
            entries = (await admin.get("/admin/ledger")).json()
            assert [it["kind"] for it in entries if it["sandbox_id"]] == ["created"]
        assert Ledger.load(ledger_path).live() == [sandbox.sandbox_id]
        program.terminate()
        assert await asyncio.wait_for(program.wait(), 10) == 0
        assert Ledger.load(ledger_path).live() == []


class TestSettings:
    def test_sdk_is_imported_only_when_used(self) -> None:
        script = "import sys, sandbox_pipeline.sandboxes.e2b; sys.exit('e2b' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

    @pytest.mark.parametrize("environ", [{}, {"E2B_API_KEY": ""}])
    def test_missing_key_is_named(self, environ: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match=r"E2B_API_KEY is not set: .*https://e2b\.dev"):
            E2BProvider.from_environ(environ)

    @pytest.mark.parametrize("key", [API_KEY + "\n", f" {API_KEY}", "e2b_a b", "e2b_\u200b"])
    def test_malformed_key_is_refused_and_not_shown(self, key: str) -> None:
        with pytest.raises(ConfigError, match="E2B_API_KEY") as caught:
            E2BProvider.from_environ({"E2B_API_KEY": key})
        assert key.strip() not in str(caught.value)

    @pytest.mark.parametrize("value", ["true", "True", "1", "yes"])
    def test_debug_is_refused(self, value: str) -> None:
        with pytest.raises(ConfigError, match="E2B_DEBUG"):
            E2BProvider.from_environ({"E2B_API_KEY": API_KEY, "E2B_DEBUG": value})

    def test_debug_switched_off_is_fine(self) -> None:
        E2BProvider.from_environ({"E2B_API_KEY": API_KEY, "E2B_DEBUG": "false"})

    def test_key_is_in_no_representation(self) -> None:
        provider = E2BProvider.from_environ({"E2B_API_KEY": API_KEY})
        assert API_KEY not in repr(provider) + str(provider) + repr(vars(provider)["_client"])

    async def test_diagnosis_accepts_a_key_and_a_template(self, provider: E2BProvider) -> None:
        found = await provider.diagnose(SandboxConfig.model_validate({}))
        assert [check.state for check in found] == ["ok", "ok"]

    async def test_diagnosis_tells_a_missing_template(self, provider: E2BProvider) -> None:
        found = await provider.diagnose(SandboxConfig.model_validate({"template": "no-such"}))
        assert [check.state for check in found] == ["ok", "failed"]
        assert "no-such" in found[1].name
        assert "sandbox.template" in found[1].remedy

    async def test_diagnosis_that_can_not_be_made_is_a_warning(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        server.faults.add(Fault(path="/templates/.*", status=500, body="oops"))
        found = await provider.diagnose(SandboxConfig.model_validate({}))
        assert [check.state for check in found] == ["ok", "warning"]

    async def test_diagnosis_tells_a_wrong_key_from_a_dead_network(self, server: E2BServer) -> None:
        wrong = {**server.environ, "E2B_API_KEY": "e2b_wrong"}
        dead = {**server.environ, "E2B_API_URL": "http://127.0.0.1:9"}
        for environ, told, remedy in ((wrong, "401", "dashboard"), (dead, "Connect", "E2B_DOMAIN")):
            provider = E2BProvider.from_environ(environ)
            [check] = await provider.diagnose(SandboxConfig.model_validate({}))
            assert (check.name, check.state) == ("E2B_API_KEY", "failed")
            assert told in check.finding
            assert remedy in check.remedy
            assert "e2b_wrong" not in check.finding


class TestInjection:
    async def test_headers_are_put_on_requests_outside(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        headers = {"x-api-key": "canary-key-12345"}
        spec = spec_of(network="model_api", model_host="model.test", model_headers=headers)
        assert "canary" not in repr(spec)
        sandbox = await provider.create(spec)
        network = server.request_bodies[-1]["network"]
        assert network["allowOut"] == ["model.test"]
        assert network["rules"] == {"model.test": [{"transform": {"headers": headers}}]}
        assert await provider.injects(sandbox.sandbox_id, "model.test")
        assert not await provider.injects(sandbox.sandbox_id, "other.test")
        env = await shell(sandbox, "env; cat /proc/*/environ")
        assert b"canary" not in env.stdout

    async def test_server_that_drops_rules_is_found_out(self) -> None:
        async with E2BServer(limits=Limits(rules="ignored")) as server:
            provider = E2BProvider.from_environ(server.environ)
            spec = spec_of(network="full", model_headers={"x-api-key": "canary-key-12345"})
            sandbox = await provider.create(spec)
            assert not await provider.injects(sandbox.sandbox_id, spec.model_host)

    async def test_sandbox_without_network_gets_no_key(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        await provider.create(spec_of(network="none", model_headers={"x-api-key": "canary-1234"}))
        assert "canary" not in str(server.request_bodies[-1])


async def test_discarded_snapshot_is_gone_and_may_be_discarded_again(
    server: E2BServer, provider: E2BProvider
) -> None:
    sandbox = await provider.create(spec_of())
    base = await provider.snapshot(sandbox)
    assert await provider.snapshots_of(sandbox.sandbox_id) == [base]
    assert await provider.snapshots_of("another") == []
    await provider.discard(base)
    await provider.discard(base)
    assert await provider.snapshots_of(sandbox.sandbox_id) == []
    with pytest.raises(ProviderError) as caught:
        await provider.create(spec_of(base=base))
    assert caught.value.kind is ErrorKind.MISSING


async def test_each_try_has_its_own_key_where_one_is_given(
    server: E2BServer, provider: E2BProvider
) -> None:
    spec = spec_of(idempotency_key="lease-2")
    await provider.create(spec)
    assert server.ledger.entries("created")[0].idempotency_key == "lease-2"


def test_prices_are_dated_and_may_be_replaced() -> None:
    assert SandboxPrices().usd_per_second(cpu_count=2, memory_mib=512) == pytest.approx(3.025e-5)
    own = prices_from_environ({PRICES_VARIABLE: "0.001 0"})
    assert own.usd_per_second(cpu_count=2, memory_mib=512) == 0.002
    for text in ("x", "1", "0.1 -1", "2 2", "nan 0", "0 0 0"):
        with pytest.raises(ConfigError, match=PRICES_VARIABLE):
            prices_from_environ({PRICES_VARIABLE: text})
