"""What needs an extra, or can't work where it is asked for, is refused before anything happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from sandbox_pipeline import demo
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.defs.build import build_orchestration
from sandbox_pipeline.defs.executors import check_extra, check_place, executor_named
from sandbox_pipeline.errors import ConfigError, OwnershipError
from sandbox_pipeline.lifecycle import ForkLife
from sandbox_pipeline.orchestrating import begin
from sandbox_pipeline.orders import Orders
from sandbox_pipeline.ownership import beaten, is_dead
from sandbox_pipeline.records import ForkRef, Orchestration, orchestration_key
from sandbox_pipeline.runtime import Runtime, silent
from sandbox_pipeline.settings import EXECUTORS, Settings
from sandbox_pipeline.testing import FaultyProvider
from tests.test_control import Make

POSTGRES = "postgresql+psycopg://somewhere/s"
WITHOUT = """\
import sys
sys.modules["{module}"] = None
from sandbox_pipeline.cli import main
sys.argv = ["sandbox-pipeline", "demo"]
sys.exit(main())
"""


@pytest.mark.parametrize("name", EXECUTORS)
def test_each_executor_is_there_by_its_name(name: str) -> None:
    assert executor_named(name).name == f"sandbox_{name}"  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "module"), [("celery", "dagster_celery"), ("k8s", "dagster_k8s")])
def test_a_missing_extra_is_one_message_with_the_remedy(
    home: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_PIPELINE_EXECUTOR", name)
    script = WITHOUT.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    expected = (
        f"SANDBOX_PIPELINE_EXECUTOR: '{name}' needs {module}, which is not installed; run: "
        f"pip install 'sandbox-pipeline[{name}]'"
    )
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(home.glob("sandboxes/*"))
    assert not list(home.glob("history"))


def test_what_needs_no_extra_never_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("celery", "dagster_k8s"):
        monkeypatch.setitem(sys.modules, module, None)
    check_extra("async")
    with pytest.raises(ConfigError, match="'celery' needs celery"):
        check_extra("celery")


def test_pods_of_their_own_refuse_what_they_could_not_share() -> None:
    with pytest.raises(ConfigError, match=r"sandbox\.provider: 'local'"):
        check_place("k8s", "local", POSTGRES)
    with pytest.raises(ConfigError, match="SANDBOX_PIPELINE_DB_URL: SQLite"):
        check_place("k8s", "e2b", "sqlite:///x.db")
    check_place("k8s", "e2b", POSTGRES)
    check_place("async", "local", "sqlite:///x.db")


def test_a_broker_that_is_no_redis_is_refused_without_its_password() -> None:
    environ = {"SANDBOX_PIPELINE_CELERY_BROKER": "amqp://user:secret@host//"}
    with pytest.raises(ConfigError, match=r"SANDBOX_PIPELINE_CELERY_BROKER: .*'amqp'") as raised:
        Settings.from_environ(environ)
    assert "secret" not in str(raised.value)


def test_only_executors_whose_ops_run_elsewhere_repeat_an_op_that_got_lost() -> None:
    def policy(executor: str) -> dg.RetryPolicy | None:
        built = build_orchestration(config=demo.CONFIG, executor=executor)  # pyright: ignore[reportArgumentType]
        job = built.get_repository_def().get_job("orchestration_job")
        return job._op_retry_policy

    assert policy("async") is None
    assert policy("multiprocess") is None
    for name in ("celery", "k8s"):
        found = policy(name)
        assert found is not None
        assert found.max_retries > 0
        assert not found.delay


async def test_the_process_that_gives_signs_of_life_is_the_one_whose_death_counts(
    runtime: Runtime, config: Make
) -> None:
    """An op that claimed the orchestration may have run on a Celery worker, which is gone."""
    await begin(runtime, config(), "w", "run-1")
    claimed = await runtime.store.need(Orchestration, orchestration_key("w"))
    assert claimed.owner is not None
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    elsewhere = claimed.evolve(owner=claimed.owner.model_copy(update={"pid": gone.pid}))
    assert elsewhere.owner is not None
    assert is_dead(elsewhere.owner)
    adopted = beaten(elsewhere, "run-1").owner
    assert adopted is not None
    assert not is_dead(adopted)
    assert adopted.epoch == claimed.owner.epoch
    assert beaten(elsewhere, "run-2") == elsewhere, "only the owner's own run"
    ref = ForkRef(workflow_id="w", fork_num=0)
    assert await runtime.orders.of(ref, "run-1") is None
    await runtime.store.update(
        Orchestration, claimed.key, lambda it: it.evolve(owner=elsewhere.owner)
    )
    with pytest.raises(OwnershipError, match="the worker of run run-1 is dead"):
        await Orders(runtime.store).of(ref, "run-1")


async def test_a_local_sandbox_is_refused_on_another_machine_than_the_runs(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    def elsewhere(it: Orchestration) -> Orchestration:
        assert it.owner is not None
        return it.evolve(owner=it.owner.model_copy(update={"boot": "another-boot pid:[1]"}))

    made: OrchestrationConfig = config(num_forks=2)
    await begin(runtime, made, "w", "run-1")
    await runtime.store.update(Orchestration, orchestration_key("w"), elsewhere)
    await ForkLife(runtime, ForkRef(workflow_id="w", fork_num=0), "run-1", silent).create_sandbox()
    [first, _] = await runtime.store.forks("w")
    assert first.failure_class == "creation_failed"
    assert "machine of the run's worker" in (first.message or "")
    assert provider.ledger.created == []
