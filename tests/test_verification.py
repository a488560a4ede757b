"""Patches verified in fresh sandboxes, by agents honest and not."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.agents.base import Task
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import ConfigError, ErrorKind, ProviderError
from sandbox_pipeline.lifecycle import ForkLife
from sandbox_pipeline.orchestrating import begin, settle_cancelled
from sandbox_pipeline.records import (
    AgentResult,
    Event,
    Fork,
    ForkRef,
    Outcome,
    Verification,
    fork_key,
)
from sandbox_pipeline.runtime import Runtime, silent
from sandbox_pipeline.sandboxes.base import WORKSPACE, Command, Sandbox
from sandbox_pipeline.testing import FakeAgent, Fault, FaultyProvider, drive
from tests.conftest import make_repo

Make = Callable[..., OrchestrationConfig]

ADD = "def add(a, b):\n    return a - b\n"
TEST = """\
import unittest
from add import add

class AddTest(unittest.TestCase):
    def test_adds(self):
        self.assertEqual(add(2, 3), 5)
"""
UNITTEST = "python3 -B -m unittest discover --quiet -s tests -t ."
FIX = "sed -i s/-/+/ add.py"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    files: dict[str, str | bytes] = {
        "add.py": ADD,
        "tests/__init__.py": "",
        "tests/test_add.py": TEST,
    }
    return make_repo(tmp_path / "repo", files)


def shell(*scripts: str) -> FakeAgent:
    """An agent that runs a script in the workspace, one for each fork."""

    async def work(sandbox: Sandbox, task: Task) -> AgentResult:
        script = scripts[task.fork_num % len(scripts)]
        done = await sandbox.run(Command(["sh", "-ec", script], cwd=WORKSPACE))
        assert done.exit_code == 0, done.stderr
        return AgentResult(outcome=Outcome.SUCCESS, exit_code=0)

    return FakeAgent(work)


async def verified(runtime: Runtime, config: OrchestrationConfig, *scripts: str) -> Verification:
    """What came of the first fork's patch."""
    runtime._agents["fake"] = shell(*scripts)
    done = await drive(runtime, config, "w")
    [fork, *_] = await runtime.store.forks("w")
    assert fork.outcome is Outcome.SUCCESS, fork
    assert fork.verification is not None
    assert done.rows[0]["verification"] == fork.verification.outcome
    return fork.verification


def one(config: Make, **changes: Any) -> OrchestrationConfig:
    given = {"verify_command": UNITTEST, "verify_protect": ["tests/**"], **changes}
    return config(num_forks=1, **given)


async def test_a_right_patch_is_verified_and_a_wrong_one_rejected(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    events: list[Event] = []
    runtime._agents["fake"] = shell(FIX, "echo '# no' >> add.py", "true")
    settings = config(num_forks=3, max_concurrent=1, verify_command=UNITTEST)
    done = await drive(runtime, settings, "w", events=events)
    assert [row["verification"] for row in done.rows] == ["verified", "rejected", "unverified"]
    assert [row["outcome"] for row in done.rows] == ["success"] * 3
    assert "verify_command exited with 1" in str(done.rows[1]["verify_reason"])
    assert (done.summary["verified"], done.summary["rejected"]) == (1, 1)
    log = Path(str(done.rows[1]["verify_log_path"])).read_text(encoding="utf-8")
    assert "AssertionError: -1 != 5" in log
    assert len(provider.ledger.created) == 5, "no sandbox where there is nothing to verify"
    assert provider.ledger.alive == []
    assert provider.ledger.most_alive == 1, "verification takes the fork's own slot"
    order = [(e.name, e.fork_num) for e in events if e.name in ("patch-verified", "fork-started")]
    assert order.index(("patch-verified", 0)) < order.index(("fork-started", 1)), "depth first"


HIJACK = "import os\nimport atexit\natexit.register(lambda: os._exit(0))\n"
PYTEST_HIJACK = """\
import pytest

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    outcome.get_result().outcome = "passed"
"""


@pytest.mark.parametrize(
    ("script", "restored"),
    [
        ("sed -i s/5/-1/ tests/test_add.py", ("tests/test_add.py",)),
        ("rm -r tests; echo '# x' >> add.py", ("tests/__init__.py", "tests/test_add.py")),
        ("echo > tests/test_add.py", ("tests/test_add.py",)),
        (
            "cp -r tests /tmp/t; rm -r tests; mkdir other; ln -s other tests",
            ("tests/__init__.py", "tests/test_add.py"),
        ),
        ("mv tests elsewhere", ("tests/__init__.py", "tests/test_add.py")),
        (f"printf %s {shlex.quote(HIJACK)} > sitecustomize.py", ("sitecustomize.py",)),
        (f"printf %s {shlex.quote(PYTEST_HIJACK)} > conftest.py", ("conftest.py",)),
        ("mkdir unittest; echo 'import os; os._exit(0)' > unittest/__init__.py", None),
        ("echo 'import os; os._exit(0)' > unittest.py", ("unittest.py",)),
        ("mkdir ../bin; printf '#!/bin/sh\\n' > ../bin/python3; echo x >> add.txt", ()),
        ("git config core.hooksPath h; git commit -qam x --allow-empty; echo x > y", ()),
    ],
)
async def test_an_agent_that_tampers_is_rejected(
    runtime: Runtime, config: Make, script: str, restored: tuple[str, ...] | None
) -> None:
    found = await verified(runtime, one(config, verify_command=f"PYTHONPATH=. {UNITTEST}"), script)
    assert found.outcome == "rejected", found
    assert restored is None or found.restored == restored


async def test_an_agent_that_mends_and_tampers_is_verified_by_the_protected_tests_only(
    runtime: Runtime, config: Make
) -> None:
    found = await verified(runtime, one(config), f"{FIX}; echo > tests/test_add.py; cp add.py z.py")
    assert found.outcome == "verified"
    assert found.restored == ("tests/test_add.py",)


async def test_without_protection_the_same_hijack_would_pass(
    runtime: Runtime, config: Make
) -> None:
    """The counter-check: the tests above would see a protection that does nothing."""
    changes = {"verify_command": f"PYTHONPATH=. {UNITTEST}", "verify_protect_runner": False}
    script = f"printf %s {shlex.quote(HIJACK)} > sitecustomize.py"
    assert (await verified(runtime, one(config, **changes), script)).outcome == "verified"


WRITE = "printf '<testsuite>%s</testsuite>' "
CASES = '\'<testcase name="a"/><testcase name="b"><failure/></testcase>\''


@pytest.mark.parametrize(
    ("changes", "outcome", "reason"),
    [
        ({"verify_command": "no-such-runner"}, "error", "could not be run (exit code 127)"),
        ({"verify_command": "sleep 60", "verify_timeout_seconds": 0.5}, "rejected", "within 0.5 s"),
        ({"verify_command": "exit 7"}, "rejected", "exited with 7"),
        ({"verify_command": "kill -9 $$"}, "rejected", "exited with 137"),
        (
            {"verify_command": "true", "verify_junit": "out/r.xml"},
            "error",
            "left no out/r.xml",
        ),
        (
            {"verify_command": "echo junk > r.xml", "verify_junit": "r.xml"},
            "error",
            "r.xml can't be read: not well-formed",
        ),
        (
            {"verify_command": f"{WRITE}{CASES} > r.xml", "verify_junit": "r.xml"},
            "rejected",
            "1 of 2 tests failed: b",
        ),
        (
            {"verify_command": f"{WRITE}'' > r.xml", "verify_junit": "r.xml"},
            "unverified",
            "no test was run",
        ),
        (
            {
                "verify_command": f"{WRITE}'<testcase name=\"a\"/>' > r.xml",
                "verify_junit": "r.xml",
            },
            "verified",
            "1 tests passed",
        ),
        (
            {"verify_command": "head -c 50000000 /dev/zero > r.xml", "verify_junit": "r.xml"},
            "error",
            "larger than 20 MB",
        ),
    ],
)
async def test_what_the_command_may_do(
    runtime: Runtime, config: Make, changes: dict[str, Any], outcome: str, reason: str
) -> None:
    found = await verified(runtime, one(config, **changes), FIX)
    assert (found.outcome, reason in found.reason) == (outcome, True), found


async def test_a_report_that_the_patch_brings_along_is_not_read(
    runtime: Runtime, config: Make
) -> None:
    forged = "printf '<testsuite><testcase name=\"a\"/></testsuite>' > r.xml"
    found = await verified(
        runtime, one(config, verify_command="true", verify_junit="r.xml"), forged
    )
    assert (found.outcome, "left no r.xml" in found.reason) == ("error", True)


async def test_output_without_end_is_bounded(runtime: Runtime, config: Make) -> None:
    noisy = "head -c 100000000 /dev/zero | tr '\\0' x"
    found = await verified(runtime, one(config, verify_command=noisy), FIX)
    assert (found.outcome, found.log_truncated) == ("verified", True)
    assert Path(found.log_path or "").stat().st_size <= 1_000_000


@pytest.mark.parametrize(
    "script",
    [
        "ln -s /etc link; ln -s ../../.. up",
        "git mv add.py renamed.py; cp renamed.py add.py",
        "chmod +x add.py",
        "printf 'a\\r\\nb\\r\\n' > crlf.txt",
        "head -c 100000 /dev/urandom > binary.bin",
        "mkdir -p 'a b/ü'; echo x > 'a b/ü/-n \"q\".txt'; echo y > -rf",
        "for i in $(seq 10000); do echo $i > f$i; done",
        "mkdir sub; cd sub; git init -q; echo x > y; git add y;"
        " git -c user.name=a -c user.email=a commit -qm x",
        "rm add.py; mkdir add.py; echo x > add.py/x",
    ],
)
async def test_patches_of_every_kind_apply(runtime: Runtime, config: Make, script: str) -> None:
    found = await verified(runtime, one(config, verify_command="true"), script)
    assert found.outcome == "verified", found


@pytest.mark.parametrize(
    "patch",
    [
        b"nonsense\n",
        b"diff --git a/.git/hooks/x b/.git/hooks/x\nnew file mode 100755\n--- /dev/null\n"
        b"+++ b/.git/hooks/x\n@@ -0,0 +1 @@\n+x\n",
        b"diff --git a/../out b/../out\nnew file mode 100644\n--- /dev/null\n+++ b/../out\n"
        b"@@ -0,0 +1 @@\n+x\n",
        b"diff --git a/add.py b/add.py\n--- a/add.py\n+++ b/add.py\n@@ -1 +1 @@\n-gone\n+x\n",
    ],
)
async def test_a_patch_that_does_not_apply_is_rejected_with_the_reason(
    runtime: Runtime, config: Make, patch: bytes
) -> None:
    runtime._agents["fake"] = shell(FIX)
    await begin(runtime, one(config), "w", "run-1")
    life = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=0), "run-1", silent)
    for stage in (life.create_sandbox, life.health_check, life.run_agent, life.cleanup_sandbox):
        await stage()
    fork = await runtime.store.need(Fork, fork_key("w", 0))
    assert fork.patch is not None
    Path(fork.patch.path or "").write_bytes(patch)
    await life.verify_patch()
    fork = await runtime.store.need(Fork, fork_key("w", 0))
    assert fork.verification is not None
    assert fork.verification.outcome == "rejected"
    assert "the patch does not apply to the base commit: error: " in fork.verification.reason


async def test_what_setup_left_in_the_workspace_is_in_no_patchs_way(
    runtime: Runtime, config: Make
) -> None:
    settings = one(config, setup_command="echo built > built.txt", verify_command="cat built.txt")
    found = await verified(runtime, settings, f"{FIX}; echo changed > built.txt")
    assert found.outcome == "verified"
    assert Path(found.log_path or "").read_text(encoding="utf-8") == "changed\n"


async def test_the_verifications_sandbox_has_no_network_and_nothing_of_the_agents(
    runtime: Runtime, config: Make
) -> None:
    command = "test ! -e ../left && test $(ls /sys/class/net | grep -vc '^lo$') = 0"
    found = await verified(runtime, one(config, verify_command=command), f"{FIX}; echo > ../left")
    assert found.outcome == "verified", found


async def test_a_provider_that_fails_is_an_error_of_the_verification_only(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    async def last_words(sandbox: Sandbox, task: Task) -> AgentResult:
        await sandbox.write(f"{WORKSPACE}/new", b"x")
        provider.faults = [Fault("create", ProviderError(ErrorKind.UNAVAILABLE, "no"), times=99)]
        return AgentResult(outcome=Outcome.SUCCESS)

    runtime._agents["fake"] = FakeAgent(last_words)
    done = await drive(runtime, one(config), "w")
    assert (done.rows[0]["outcome"], done.rows[0]["verification"]) == ("success", "error")
    assert done.rows[0]["verify_reason"] == "no"
    assert done.error is None
    assert provider.ledger.alive == []


async def test_a_cancel_while_verifying_leaves_no_sandbox(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    import asyncio

    runtime._agents["fake"] = shell(FIX)
    running = asyncio.create_task(drive(runtime, one(config, verify_command="sleep 60"), "w"))
    while len(provider.ledger.created) < 2:
        await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await settle_cancelled(runtime, "run-1")
    assert provider.ledger.alive == []


async def test_a_verification_cut_short_by_a_crash_is_made_again(
    runtime: Runtime, config: Make, provider: FaultyProvider, agent: FakeAgent
) -> None:
    first = await verified(runtime, one(config), FIX)
    assert first.outcome == "verified"
    await runtime.store.update(Fork, fork_key("w", 0), lambda it: it.evolve(verification=None))
    await drive(runtime, one(config), "w", run_id="run-1")
    fork = await runtime.store.need(Fork, fork_key("w", 0))
    assert fork.verification is not None
    assert fork.verification.outcome == "verified"
    assert len(provider.ledger.created) == 3, "the agent did not run again"


@pytest.mark.parametrize(
    "changes",
    [
        {"verify_protect": ["/etc/passwd"]},
        {"verify_protect": ["../x"]},
        {"verify_junit": "/tmp/x.xml"},
        {"verify_junit": "../x.xml"},
        {"verify_command": "a\0b"},
        {"verify_timeout_seconds": 0},
    ],
)
def test_wrong_settings_are_refused(config: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"verify_"):
        config(**changes)


async def test_a_patch_that_ends_the_process_early_has_no_report_to_show(
    runtime: Runtime, config: Make
) -> None:
    """The one hijack that no protected file prevents: the code under test itself."""
    runner = (
        "import unittest, tests.test_add as t; "
        "r = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromModule(t)); "
        "open('r.xml', 'w').write('<testsuite><testcase name=\"a\"/></testsuite>')"
    )
    settings = one(config, verify_command=f'python3 -B -c "{runner}"'.replace('\\"', "'"),
                   verify_junit="r.xml")  # fmt: skip
    found = await verified(runtime, settings, "echo 'import os; os._exit(0)' > add.py")
    assert (found.outcome, "left no r.xml" in found.reason) == ("error", True), found
