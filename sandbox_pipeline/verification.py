"""A fork's patch, tried where the agent never was: a fresh sandbox at the base commit.

The patch is applied to an index of the pinned commit, the protected paths are put back, and only
then are the files written and the command run. What the agent did to its own sandbox has no part
in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from sandbox_pipeline import leasing, preparation
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.junit import MAX_BYTES as MAX_JUNIT_BYTES
from sandbox_pipeline.junit import Counts, JUnitError, read_junit
from sandbox_pipeline.records import (
    Control,
    Fork,
    ForkRef,
    Lease,
    Orchestration,
    Outcome,
    SandboxState,
    Verdict,
    Verification,
    orchestration_key,
)
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import (
    STATE_DIR,
    WORKSPACE,
    Command,
    CommandResult,
    Network,
    Sandbox,
)
from sandbox_pipeline.sandboxes.steady import SteadySandbox
from sandbox_pipeline.workspace.checkout import GIT_ENV, tail

LOG_FILE = "verification.log"
MAX_LOG_BYTES = 1_000_000
MAX_RESTORED = 50
MAX_REASON_CHARS = 500
APPLY_TIMEOUT_SECONDS = 600
READ_BYTES = 1_000_000
SLOT_POLL_SECONDS = 0.25
DOES_NOT_APPLY = 65

RUNNER_FILES = (
    "**/conftest.py",
    "**/sitecustomize.py",
    "**/usercustomize.py",
    "**/pytest.ini",
    "**/.pytest.ini",
    "**/tox.ini",
    "**/*.pth",
    "pytest.py",
    "pytest/**",
    "_pytest/**",
    "unittest.py",
    "unittest/**",
    "**/.mocharc.*",
    "**/jest.config.*",
    "**/vitest.config.*",
)
"""By which a patch could take over the test runners most used, without touching a test."""

# The index of the pinned commit takes the patch, not the workspace: files that setup_command
# left behind are in nobody's way, and no link in the tree is followed while applying.
_APPLY = f"""\
cd {WORKSPACE} || exit 1
export GIT_DIR={STATE_DIR}/repo.git GIT_WORK_TREE={WORKSPACE} GIT_INDEX_FILE={STATE_DIR}/v.index
rm -f "$GIT_INDEX_FILE" "$GIT_INDEX_FILE.lock"
git read-tree "$COMMIT" || exit 1
git apply --cached --binary --whitespace=nowarn {STATE_DIR}/verify.patch || exit {DOES_NOT_APPLY}
set -e
if [ $# -gt 0 ]; then
  git diff --cached --name-only -z --no-renames --no-ext-diff "$COMMIT" -- "$@"
  git reset --quiet "$COMMIT" -- "$@" >&2
fi
git diff --cached --name-only -z --no-renames --no-ext-diff --diff-filter=D "$COMMIT" \\
  | xargs -0 -r rm -rf --
git checkout-index --force --all
if [ -n "$JUNIT" ]; then rm -rf -- "$JUNIT"; fi
"""


@dataclass(frozen=True)
class _Run:
    """What came of patch and command, before anything is judged.

    Attributes:
        result: of the command; of applying the patch where that failed (`applied` is False).
    """

    result: CommandResult
    restored: tuple[str, ...] = ()
    junit: bytes | None = None
    applied: bool = True


def is_wanted(orchestration: Orchestration, fork: Fork) -> bool:
    """Whether this fork's patch is still to be verified."""
    return (
        orchestration.config.verify_command is not None
        and orchestration.control is not Control.CANCEL
        and orchestration.fatal is None
        and fork.verification is None
        and fork.outcome.is_terminal
        and fork.outcome is not Outcome.CANCELLED
        and fork.patch is not None
        and fork.patch.size_bytes > 0
    )


async def verify(
    runtime: Runtime, orchestration: Orchestration, fork: Fork, run_id: str, folder: Path
) -> Verification | None:
    """Try a fork's patch in a sandbox of its own, which is gone afterwards.

    Args:
        runtime: of this process.
        orchestration: with a `verify_command`.
        fork: which is done and has a patch.
        run_id: the Dagster run that works on it.
        folder: for the log.

    Returns:
        None when the orchestration was cancelled meanwhile.

    Raises:
        AgentError: the workspace could not be made.
        ProviderError: no sandbox could be had, or it failed.
    """
    began = time.monotonic()
    patch = fork.patch
    if patch is None or patch.path is None:
        return Verification(outcome=Verdict.UNVERIFIED, reason="the fork has no patch")
    if patch.truncated:
        reason = "only a part of the patch was kept (max_patch_mb)"
        return Verification(outcome=Verdict.UNVERIFIED, reason=reason)
    await end_left_overs(runtime, orchestration, fork)
    lease = await admitted(runtime, orchestration, fork, run_id)
    if lease is None:
        return None
    async with fresh_sandbox(
        runtime, orchestration, lease, orchestration.config.verify_network
    ) as sandbox:
        outcome = await _try_patch(sandbox, orchestration, Path(patch.path))
    redactor = runtime.redactor(orchestration)
    log = folder / LOG_FILE
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(redactor.clean(outcome.result.stdout + outcome.result.stderr)[0])
    if outcome.applied:
        found = judge(orchestration.config, outcome.result, outcome.junit)
    else:
        reason = f"the patch does not apply to the base commit: {tail(outcome.result)}"
        found = Verification(outcome=Verdict.REJECTED, reason=reason)
    return found.model_copy(
        update={
            "reason": _short(redactor.text(found.reason)),
            "failed_tests": tuple(redactor.text(name) for name in found.failed_tests),
            "restored": tuple(redactor.text(name) for name in outcome.restored),
            "seconds": time.monotonic() - began,
            "log_path": str(log),
            "log_truncated": outcome.result.truncated,
        }
    )


def judge(config: OrchestrationConfig, result: CommandResult, junit: bytes | None) -> Verification:
    """What a run of the command means.

    Args:
        config: says whether there is a JUnit report to read.
        result: of the command.
        junit: the report, or None where there is none.
    """
    code = result.exit_code
    if result.timed_out:
        reason = f"verify_command did not end within {config.verify_timeout_seconds:g} s"
        return Verification(outcome=Verdict.REJECTED, reason=reason, exit_code=code)
    if code in (126, 127):
        reason = f"verify_command could not be run (exit code {code}): {tail(result, 200)}"
        return Verification(outcome=Verdict.ERROR, reason=reason, exit_code=code)
    counts: Counts | None = None
    if config.verify_junit is not None:
        if junit is None and code == 0:
            reason = f"verify_command left no {config.verify_junit} (verify_junit)"
            return Verification(outcome=Verdict.ERROR, reason=reason, exit_code=code)
        try:
            counts = None if junit is None else read_junit(junit)
        except JUnitError as error:
            reason = f"verify_junit: {config.verify_junit} can't be read: {error}"
            return Verification(outcome=Verdict.ERROR, reason=reason, exit_code=code)
    verdict, reason = _verdict(code, counts, result)
    return Verification(
        outcome=verdict,
        reason=reason,
        exit_code=code,
        tests_passed=counts and counts.passed,
        tests_failed=counts and counts.failed,
        tests_skipped=counts and counts.skipped,
        failed_tests=tuple(counts.names) if counts else (),
    )


def _verdict(code: int, counts: Counts | None, result: CommandResult) -> tuple[Verdict, str]:
    if counts is not None and counts.failed:
        total = counts.passed + counts.failed
        named = ", ".join(counts.names[:3])
        return Verdict.REJECTED, f"{counts.failed} of {total} tests failed: {named}"
    if code != 0:
        return Verdict.REJECTED, f"verify_command exited with {code}: {_last_words(result)}"
    if counts is not None and counts.passed == 0:
        return Verdict.UNVERIFIED, "verify_command passed, but no test was run"
    if counts is not None:
        return Verdict.VERIFIED, f"{counts.passed} tests passed"
    return Verdict.VERIFIED, "verify_command passed"


def _last_words(result: CommandResult) -> str:
    """The last error that the command named, and its last line."""
    said = (result.stdout + result.stderr).decode("utf-8", "replace")
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E\s+)?[\w.]*(Error|Exception)\b", line)]
    chosen = dict.fromkeys([*errors[-1:], *lines[-1:]])
    return "; ".join(chosen)[:300] or "it said nothing"


async def _try_patch(sandbox: Sandbox, orchestration: Orchestration, patch: Path) -> _Run:
    config = orchestration.config
    await sandbox.write(f"{STATE_DIR}/verify.patch", await asyncio.to_thread(patch.read_bytes))
    globs = [*config.verify_protect, *(RUNNER_FILES if config.verify_protect_runner else ())]
    applied = await sandbox.run(
        Command(
            ["sh", "-c", _APPLY, "sh", *(f":(top,glob){glob}" for glob in globs)],
            cwd=STATE_DIR,
            env={
                **GIT_ENV,
                "COMMIT": orchestration.base_commit or "",
                "JUNIT": config.verify_junit or "",
            },
            timeout_seconds=APPLY_TIMEOUT_SECONDS,
        )
    )
    if applied.exit_code == DOES_NOT_APPLY:
        return _Run(applied, applied=False)
    if applied.exit_code != 0:
        msg = f"the patch could not be put into the sandbox: {tail(applied)}"
        raise ProviderError(ErrorKind.INVALID, msg)
    named = applied.stdout.decode("utf-8", "replace").split("\0")[:-1]
    result = await sandbox.run(
        Command(
            ["sh", "-c", f"exec 2>&1\n{config.verify_command}"],
            cwd=WORKSPACE,
            env={"CI": "true"},
            timeout_seconds=config.verify_timeout_seconds,
            max_output_bytes=MAX_LOG_BYTES,
        )
    )
    junit = None
    if config.verify_junit is not None and not result.timed_out:
        junit = await _read(sandbox, f"{WORKSPACE}/{config.verify_junit}")
    return _Run(result, tuple(named[:MAX_RESTORED]), junit)


async def _read(sandbox: Sandbox, path: str) -> bytes | None:
    data = b""
    try:
        while len(data) <= MAX_JUNIT_BYTES:
            chunk = await sandbox.read(path, offset=len(data), max_bytes=READ_BYTES)
            if not chunk:
                break
            data += chunk
    except FileNotFoundError:
        return None
    return data


async def end_left_overs(runtime: Runtime, orchestration: Orchestration, fork: Fork) -> None:
    """End the fresh sandboxes of a fork that a crashed run left."""
    for lease in await runtime.store.leases(orchestration.workflow_id):
        if lease.fork_num == fork.fork_num and lease.purpose == "verify":
            note = "left by a crashed run"
            await leasing.end(runtime, lease, orchestration.config.retry, note=note)


async def admitted(
    runtime: Runtime, orchestration: Orchestration, fork: Fork, run_id: str
) -> Lease | None:
    """A stored intent within `max_concurrent`; None when cancelled while waiting."""
    if fork.sandbox_state not in (None, SandboxState.GONE):
        msg = "the fork's own sandbox could not be ended, and it holds the slot"
        raise ProviderError(ErrorKind.UNAVAILABLE, msg)
    limit = orchestration.config.max_concurrent
    ref = ForkRef(workflow_id=fork.workflow_id, fork_num=fork.fork_num)
    await runtime.slots.take(ref, limit)
    wanted = leasing.new_lease(
        orchestration, run_id, fork_num=fork.fork_num, attempt=1, purpose="verify"
    )
    while True:
        current = await runtime.store.need(
            Orchestration, orchestration_key(orchestration.workflow_id)
        )
        if current.control is Control.CANCEL:
            return None
        lease = await runtime.store.admit(wanted, limit)
        if lease is not None:
            return lease
        await asyncio.sleep(SLOT_POLL_SECONDS)


@contextlib.asynccontextmanager
async def fresh_sandbox(
    runtime: Runtime, orchestration: Orchestration, lease: Lease, network: Network
) -> AsyncGenerator[Sandbox]:
    """A sandbox at the base commit, after `setup_command`, which ends with the block."""
    config = orchestration.config
    before_attempt, after_failure = leasing.numbered_here(f"fresh sandbox of {lease.key}")
    created = await leasing.create(
        runtime,
        orchestration,
        lease,
        permit=await leasing.wait_for_permit(runtime, orchestration),
        network=network,
        base=orchestration.base_snapshot,
        before_attempt=before_attempt,
        after_failure=after_failure,
    )
    sandbox = SteadySandbox(created.sandbox, config.retry)
    beat = asyncio.create_task(_keep_alive(sandbox, config.sandbox.orphan_grace_seconds))
    try:
        if created.base is None:
            await preparation.put(sandbox, orchestration, lease.fork_num or 0)
        yield sandbox
    finally:
        beat.cancel()
        await asyncio.wait({beat})
        await leasing.shielded(
            leasing.end(runtime, created.lease, config.retry, note="no longer needed")
        )


async def _keep_alive(sandbox: Sandbox, grace_seconds: float) -> None:
    while True:
        with contextlib.suppress(ProviderError):
            await sandbox.extend(grace_seconds)
        await asyncio.sleep(grace_seconds / 3)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON_CHARS else f"{text[: MAX_REASON_CHARS - 1]}…"
