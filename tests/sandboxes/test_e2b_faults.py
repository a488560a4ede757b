"""What the E2B provider makes of an API that fails; the server's ledger is the truth.

The numbers in the names of classes are rows of the table of faults to survive.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import traceback
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from sandbox_pipeline.conformance.providers import ids, shell
from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.base import WORKSPACE, Command, Sandbox
from sandbox_pipeline.sandboxes.e2b import E2BProvider
from sandbox_pipeline.sandboxes.e2b_errors import MAX_MESSAGE_CHARS, Call, provider_error
from tests.sandboxes.test_e2b import spec_of
from tests.servers.e2b_server import API_KEY, E2BServer, Fault, Limits, api_error

CREATE: dict[str, Any] = {"method": "POST", "path": "/v2/sandboxes"}
KILL: dict[str, Any] = {"method": "DELETE", "path": "/sandboxes/.*"}
HTML = {"content-type": "text/html; charset=utf-8"}


@pytest.fixture
async def server() -> AsyncIterator[E2BServer]:
    async with E2BServer() as running:
        yield running


@pytest.fixture
def provider(server: E2BServer) -> E2BProvider:
    return E2BProvider(
        API_KEY, api_url=server.url, sandbox_url=server.url, request_timeout_seconds=5
    )


def impatient(server: E2BServer) -> E2BProvider:
    return E2BProvider(
        API_KEY, api_url=server.url, sandbox_url=server.url, request_timeout_seconds=0.5
    )


async def refused(provider: E2BProvider) -> ProviderError:
    """The error that a create call raises, checked for what holds for every error."""
    with pytest.raises(ProviderError) as caught:
        await provider.create(spec_of())
    error = caught.value
    assert len(str(error)) <= MAX_MESSAGE_CHARS
    shown = "".join(traceback.format_exception(error)) + repr(error)
    assert API_KEY not in shown
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def posts(server: E2BServer) -> int:
    return len(server.ledger.requests("POST", "/v2/sandboxes"))


class TestRefusedForGood1And2:
    @pytest.mark.parametrize("status", [401, 403])
    async def test_refused_key_is_auth_and_names_the_variable(
        self, server: E2BServer, provider: E2BProvider, status: int
    ) -> None:
        server.faults.add(api_error(status, "no", **CREATE, times=0))
        error = await refused(provider)
        assert error.kind is ErrorKind.AUTH
        assert "E2B_API_KEY" in str(error)
        assert posts(server) == 1
        assert server.ledger.created() == []

    async def test_wrong_key_is_auth(self, server: E2BServer) -> None:
        provider = E2BProvider("e2b_wrong_wrong", api_url=server.url, sandbox_url=server.url)
        with pytest.raises(ProviderError) as caught:
            await provider.create(spec_of())
        assert caught.value.kind is ErrorKind.AUTH
        assert "e2b_wrong_wrong" not in str(caught.value)

    async def test_unknown_template_is_missing_and_named(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        with pytest.raises(ProviderError, match="no-such-template") as caught:
            await provider.create(spec_of(base="no-such-template"))
        assert caught.value.kind is ErrorKind.MISSING
        assert posts(server) == 1

    async def test_too_long_a_life_is_invalid(self) -> None:
        async with E2BServer(limits=Limits(max_ttl_seconds=3600)) as server:
            provider = E2BProvider.from_environ(server.environ)
            with pytest.raises(ProviderError, match="greater than 1 hours") as caught:
                await provider.create(spec_of(ttl_seconds=7200))
            assert caught.value.kind is ErrorKind.INVALID
            sandbox = await provider.create(spec_of())
            with pytest.raises(ProviderError) as caught:
                await sandbox.extend(7200)
            assert caught.value.kind is ErrorKind.INVALID

    @pytest.mark.parametrize("status", [400, 422, 501])
    async def test_other_refusals_are_invalid(
        self, server: E2BServer, provider: E2BProvider, status: int
    ) -> None:
        server.faults.add(api_error(status, "cannot be", **CREATE))
        error = await refused(provider)
        assert error.kind is ErrorKind.INVALID
        assert f"HTTP {status}: cannot be" in str(error)


class TestConflict3:
    async def test_conflict_is_ambiguous(self, server: E2BServer, provider: E2BProvider) -> None:
        server.faults.add(api_error(409, "exists", **CREATE))
        assert (await refused(provider)).kind is ErrorKind.AMBIGUOUS


class TestRateLimit4:
    @pytest.mark.parametrize(
        ("header", "seconds"), [("2", 2.0), ("120", 120.0), (None, None), ("soon", None)]
    )
    async def test_retry_after_is_passed_on(
        self, server: E2BServer, provider: E2BProvider, header: str | None, seconds: float | None
    ) -> None:
        headers = {"content-type": "application/json"}
        headers |= {"retry-after": header} if header is not None else {}
        body = '{"code":429,"message":"slow down"}'
        server.faults.add(Fault(**CREATE, status=429, body=body, headers=headers))
        error = await refused(provider)
        assert (error.kind, error.retry_after_seconds) == (ErrorKind.RATE_LIMITED, seconds)
        assert posts(server) == 1, "the SDK's own retries are off"

    async def test_retry_after_may_be_a_date(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
        headers = HTML | {"Retry-After": moment}
        server.faults.add(Fault(**CREATE, status=429, body="<html>busy</html>", headers=headers))
        error = await refused(provider)
        assert error.kind is ErrorKind.RATE_LIMITED
        assert error.retry_after_seconds is not None
        assert 50 < error.retry_after_seconds <= 60

    async def test_too_many_sandboxes_is_rate_limited(self) -> None:
        async with E2BServer(limits=Limits(concurrent=1)) as server:
            provider = E2BProvider.from_environ(server.environ)
            await provider.create(spec_of())
            assert (await refused(provider)).kind is ErrorKind.RATE_LIMITED

    async def test_too_fast_is_rate_limited(self) -> None:
        async with E2BServer(limits=Limits(creates_per_second=2)) as server:
            provider = E2BProvider.from_environ(server.environ)
            made = await asyncio.gather(
                *(provider.create(spec_of()) for _ in range(4)), return_exceptions=True
            )
            errors = [it for it in made if isinstance(it, ProviderError)]
            assert [it.kind for it in errors] == [ErrorKind.RATE_LIMITED] * 2
            assert errors[0].retry_after_seconds == 1
            assert server.ledger.most_creates_in(1.0) == 4, "requests, not successes"


class TestServerErrors5:
    @pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
    @pytest.mark.parametrize("body", ["json", "html"])
    async def test_server_error_is_ambiguous_and_asked_once(
        self, server: E2BServer, provider: E2BProvider, status: int, body: str
    ) -> None:
        if body == "json":
            server.faults.add(api_error(status, "try later", **CREATE, times=0))
        else:
            page = f"<html><body><h1>{status}</h1></body></html>"
            server.faults.add(Fault(**CREATE, times=0, status=status, body=page, headers=HTML))
        error = await refused(provider)
        assert error.kind is ErrorKind.AMBIGUOUS
        assert f"HTTP {status}" in str(error)
        assert "<" not in str(error)
        assert posts(server) == 1


class TestDoubt6To8:
    async def test_slow_create_is_ambiguous_and_found_by_metadata(self, server: E2BServer) -> None:
        server.faults.add(Fault(**CREATE, when="after", delay_seconds=3))
        error = await refused(impatient(server))
        assert error.kind is ErrorKind.AMBIGUOUS
        assert "no answer in time" in str(error)
        await self._adopt(server)

    async def test_dropped_answer_is_ambiguous_and_found_by_metadata(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        server.faults.add(Fault(**CREATE, when="after", drop=True))
        assert (await refused(provider)).kind is ErrorKind.AMBIGUOUS
        await self._adopt(server)

    async def test_dropped_request_is_ambiguous(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        server.faults.add(Fault(**CREATE, drop=True))
        assert (await refused(provider)).kind is ErrorKind.AMBIGUOUS
        assert server.ledger.created() == []
        assert posts(server) == 1

    @pytest.mark.parametrize("body", ["", "{", "{}", "[]", "null", '"x"', "<html>", '{"a":1}'])
    async def test_unreadable_success_is_ambiguous(
        self, server: E2BServer, provider: E2BProvider, body: str
    ) -> None:
        server.faults.add(Fault(**CREATE, when="after", status=201, body=body))
        assert (await refused(provider)).kind is ErrorKind.AMBIGUOUS
        await self._adopt(server)

    async def test_cut_answer_is_ambiguous(self, server: E2BServer, provider: E2BProvider) -> None:
        server.faults.add(Fault(**CREATE, when="during", drop=True))
        assert (await refused(provider)).kind is ErrorKind.AMBIGUOUS
        await self._adopt(server)

    async def test_refused_connection_says_that_nothing_was_created(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        provider = E2BProvider(API_KEY, api_url=url, sandbox_url=url)
        assert (await refused(provider)).kind is ErrorKind.UNAVAILABLE

    async def test_address_that_is_none_is_invalid(self) -> None:
        provider = E2BProvider(API_KEY, api_url="ftp://127.0.0.1", sandbox_url="ftp://127.0.0.1")
        assert (await refused(provider)).kind is ErrorKind.INVALID

    async def test_created_sandbox_that_never_answers_is_ambiguous(
        self, server: E2BServer, provider: E2BProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sandbox_pipeline.sandboxes.e2b.READY_SECONDS", 0.5)
        server.faults.add(Fault(path="/process.*", times=0, drop=True))
        error = await refused(provider)
        assert error.kind is ErrorKind.AMBIGUOUS
        assert server.ledger.live()[0] in str(error)

    async def test_sandbox_that_answers_late_is_waited_for(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        body = '{"message":"the port is not open","code":502}'
        server.faults.add(Fault(path="/process.*", times=2, status=502, body=body))
        sandbox = await provider.create(spec_of())
        assert (await shell(sandbox, "true")).exit_code == 0

    async def _adopt(self, server: E2BServer) -> None:
        [sandbox_id] = server.ledger.live()
        provider = E2BProvider.from_environ(server.environ)
        [lease_id] = [entry.idempotency_key for entry in server.ledger.entries("created")]
        assert await ids(provider, {"lease_id": lease_id or ""}) == {sandbox_id}
        sandbox = await provider.connect(sandbox_id)
        assert (await shell(sandbox, "ls", cwd=WORKSPACE)).exit_code == 0
        assert await provider.kill(sandbox_id)
        assert server.ledger.live() == []


class TestKill19And20:
    async def test_missing_sandbox_is_no_error(self, provider: E2BProvider) -> None:
        assert await provider.kill("i0123456789") is False

    @pytest.mark.parametrize("status", [500, 503, 429])
    async def test_failed_kill_raises_and_can_be_repeated(
        self, server: E2BServer, provider: E2BProvider, status: int
    ) -> None:
        sandbox = await provider.create(spec_of())
        server.faults.add(api_error(status, "no", **KILL))
        with pytest.raises(ProviderError) as caught:
            await provider.kill(sandbox.sandbox_id)
        assert caught.value.policy.retry
        assert not caught.value.policy.reconcile
        assert server.ledger.live() == [sandbox.sandbox_id]
        assert await provider.kill(sandbox.sandbox_id) is True

    async def test_hanging_kill_ends_in_time(self, server: E2BServer) -> None:
        provider = impatient(server)
        sandbox_id = server.add_rows(1, {})[0]
        server.faults.add(Fault(**KILL, when="after", delay_seconds=3))
        with pytest.raises(ProviderError) as caught:
            await provider.kill(sandbox_id)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert await provider.kill(sandbox_id) is False, "it had been done"


class TestBodies42:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (401, ErrorKind.AUTH),
            (403, ErrorKind.AUTH),
            (400, ErrorKind.INVALID),
            (404, ErrorKind.MISSING),
            (429, ErrorKind.RATE_LIMITED),
            (500, ErrorKind.AMBIGUOUS),
            (503, ErrorKind.AMBIGUOUS),
        ],
    )
    @pytest.mark.parametrize("body", ["html", "huge", "huge json", "empty", "list", "other json"])
    async def test_error_with_any_body_is_classified(
        self, server: E2BServer, provider: E2BProvider, *, status: int, kind: ErrorKind, body: str
    ) -> None:
        text, headers = {
            "html": ("<html><body>" + "<p>Forbidden</p>" * 100, HTML),
            "huge": ("x" * 10_000_000, HTML),
            "huge json": (f'{{"code":{status},"message":"{"y" * 10_000_000}"}}', None),
            "empty": ("", None),
            "list": ("[1]", None),
            "other json": ('{"error":{"code":1}}', None),
        }[body]
        server.faults.add(
            Fault(**CREATE, status=status, body=text, headers=headers or {"content-type": "a/json"})
        )
        error = await refused(provider)
        assert error.kind is kind
        assert "<" not in str(error)

    async def test_echoed_secret_is_not_shown(self, server: E2BServer) -> None:
        environ = {**server.environ, "ANTHROPIC_API_KEY": "sk-ant-canary-canary"}
        provider = E2BProvider.from_environ(environ)
        encoded = base64.b64encode(API_KEY.encode()).decode()
        message = f"bad key {API_KEY} or {encoded} with sk-ant-canary-canary"
        server.faults.add(api_error(400, message, **CREATE))
        error = await refused(provider)
        assert encoded.rstrip("=")[:-1] not in str(error)
        assert "sk-ant-canary-canary" not in str(error)
        assert "bad key [redacted]" in str(error)

    async def test_secret_at_the_edge_of_the_bound_is_not_cut_in_two(self) -> None:
        for length in range(MAX_MESSAGE_CHARS - 90, MAX_MESSAGE_CHARS):
            error = provider_error(
                RuntimeError("x" * length + API_KEY), Call.CREATE, "do it", Redactor([API_KEY])
            )
            assert API_KEY[:12] not in str(error)


class TestSandboxOperations:
    """Faults of one live sandbox: retried by the caller unless the provider says it is gone."""

    @pytest.fixture
    async def sandbox(self, provider: E2BProvider) -> Sandbox:
        return await provider.create(spec_of())

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(path="/process.Process/Start", drop=True),
            Fault(path="/process.Process/Start", when="during", after_bytes=1, drop=True),
            Fault(path="/process.Process/Start", status=503, body="busy", headers=HTML),
            Fault(path="/process.Process/Start", status=200, body="{", headers=HTML),
        ],
    )
    async def test_lost_command_is_unavailable(
        self, server: E2BServer, sandbox: Sandbox, fault: Fault
    ) -> None:
        server.faults.add(fault)
        with pytest.raises(ProviderError) as caught:
            await sandbox.run(Command(["true"]))
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert (await sandbox.run(Command(["true"]))).exit_code == 0

    async def test_unreachable_sandbox_that_the_api_knows_is_unavailable(
        self, server: E2BServer, sandbox: Sandbox
    ) -> None:
        body = '{"sandboxId":"x","message":"The sandbox is running but port is not open"}'
        server.faults.add(Fault(path="/(process|health|files).*", times=0, status=502, body=body))
        for work in (sandbox.run(Command(["true"])), sandbox.write("/tmp/x", b"")):
            with pytest.raises(ProviderError) as caught:
                await work
            assert caught.value.kind is ErrorKind.UNAVAILABLE

    async def test_unreachable_sandbox_that_the_api_denies_is_gone(
        self, server: E2BServer, sandbox: Sandbox
    ) -> None:
        await asyncio.to_thread(server.vanish, sandbox.sandbox_id)
        server.faults.add(Fault(path="/(process|health|files).*", times=0, drop=True))
        with pytest.raises(ProviderError) as caught:
            await sandbox.run(Command(["true"]))
        assert caught.value.kind is ErrorKind.GONE

    async def test_full_disk_is_not_everybodys_failure(
        self, server: E2BServer, sandbox: Sandbox
    ) -> None:
        server.faults.add(api_error(507, "no space left", path="/files"))
        with pytest.raises(ProviderError, match="no space left") as caught:
            await sandbox.write("/tmp/file", b"data")
        assert caught.value.kind is ErrorKind.EXHAUSTED
        assert not caught.value.policy.fatal
        assert not caught.value.policy.retry

    async def test_failed_list_is_unavailable(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        for fault in (
            api_error(500, "no", method="GET", path="/v2/sandboxes"),
            Fault(method="GET", path="/v2/sandboxes", drop=True),
            Fault(method="GET", path="/v2/sandboxes", status=200, body="[{}]"),
        ):
            server.faults.clear()
            server.faults.add(fault)
            with pytest.raises(ProviderError) as caught:
                await provider.list({})
            assert caught.value.kind is ErrorKind.UNAVAILABLE

    async def test_second_page_that_fails_fails_the_list(
        self, server: E2BServer, provider: E2BProvider
    ) -> None:
        server.add_rows(150, {})
        server.faults.add(api_error(500, "no", method="GET", path="/v2/sandboxes", first=2))
        with pytest.raises(ProviderError):
            await provider.list({})

    async def test_endless_list_ends(
        self, server: E2BServer, provider: E2BProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sandbox_pipeline.sandboxes.e2b.MAX_PAGES", 5)
        headers = {"content-type": "application/json", "x-next-token": "again"}
        server.faults.add(
            Fault(
                method="GET", path="/v2/sandboxes", times=0, status=200, body="[]", headers=headers
            )
        )
        with pytest.raises(ProviderError, match="no end"):
            await provider.list({})

    @pytest.mark.parametrize("status", [404, 501])
    async def test_server_without_snapshots_is_invalid(
        self, server: E2BServer, provider: E2BProvider, sandbox: Sandbox, status: int
    ) -> None:
        server.faults.add(
            Fault(path=".*/snapshots", status=status, body="page not found", headers=HTML)
        )
        with pytest.raises(ProviderError) as caught:
            await provider.snapshot(sandbox)
        assert caught.value.kind is ErrorKind.INVALID
        assert server.ledger.live() == [sandbox.sandbox_id]

    async def test_cancelled_command_ends_at_its_deadline(
        self, server: E2BServer, sandbox: Sandbox
    ) -> None:
        quiet = server.process_count(sandbox.sandbox_id)
        work = asyncio.create_task(shell(sandbox, "sleep 100", timeout_seconds=1))
        await asyncio.sleep(0.4)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await asyncio.sleep(1.5)
        assert server.process_count(sandbox.sandbox_id) == quiet
