"""What every fork starts from: the pinned commit, and the workspace after `setup_command`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from sandbox_pipeline import demo, leasing
from sandbox_pipeline.config import DEMO_REPO, OrchestrationConfig
from sandbox_pipeline.errors import (
    AgentError,
    ConfigError,
    ErrorKind,
    FailureClass,
    ProviderError,
)
from sandbox_pipeline.ownership import held_by
from sandbox_pipeline.records import Orchestration, orchestration_key
from sandbox_pipeline.retrying import patiently
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import WORKSPACE, Command, Discarding, Network, Sandbox
from sandbox_pipeline.sandboxes.steady import SteadySandbox
from sandbox_pipeline.store.statements import Fence
from sandbox_pipeline.workspace.checkout import put_repository, tail
from sandbox_pipeline.workspace.mirror import ARCHIVE, Base, pin
from sandbox_pipeline.workspace.source import Source, check_branch, check_source

logger = logging.getLogger(__name__)


def check_repository(config: OrchestrationConfig, home: Path) -> Source:
    """Where the repository is; makes the demo's.

    Raises:
        ConfigError: it can't be used, or the branch's name is not one.
    """
    if config.branch is not None:
        check_branch(config.branch)
    if config.repo_url == DEMO_REPO:
        return Source(str(demo.make_repository(home)), "file", is_remote=False)
    return check_source(config.repo_url, allow_file_urls=config.allow_file_urls)


def network_of(orchestration: Orchestration) -> Network:
    """What the forks' sandboxes may reach, `auto` resolved."""
    return cast("Network", orchestration.network)


async def pin_base(runtime: Runtime, orchestration: Orchestration) -> Orchestration:
    """Clone once and pin the commit; what an earlier run pinned stays.

    Raises:
        ConfigError: no such repository or branch.
        GitError: git failed otherwise.
    """
    source = check_repository(orchestration.config, runtime.settings.home)
    base = await pin(
        source,
        orchestration.branch or orchestration.config.branch,
        _base_folder(orchestration),
        runtime.environ,
        commit=orchestration.base_commit,
    )
    return await runtime.store.update(
        Orchestration,
        orchestration.key,
        lambda it: it.evolve(base_commit=base.commit, branch=base.branch),
    )


async def prepare(runtime: Runtime, orchestration: Orchestration, run_id: str) -> Orchestration:
    """Run `setup_command` once, in a sandbox of its own, and keep the result for all forks.

    Where no copy can be had, nothing is kept and each fork runs it itself.

    Raises:
        AgentError: `SETUP_FAILED` with the end of the command's output, or because the forks may
            not have the network that it needs.
        ProviderError: no sandbox could be had.
    """
    config = orchestration.config
    if config.setup_command is None or orchestration.base_snapshot is not None:
        return orchestration
    lease = leasing.new_lease(orchestration, run_id, fork_num=None, attempt=1)
    for old in await runtime.store.leases(orchestration.workflow_id):
        if old.purpose == "base":
            await leasing.end(runtime, old, config.retry, note="left by a crashed run")
    admitted = await runtime.store.admit(lease, config.max_concurrent)
    if admitted is None:
        msg = "forks of an earlier run still hold all slots"
        raise ProviderError(ErrorKind.UNAVAILABLE, msg)
    before_attempt, after_failure = leasing.numbered_here("base sandbox")
    created = await leasing.create(
        runtime,
        orchestration,
        admitted,
        permit=await leasing.wait_for_permit(runtime, orchestration),
        network=_setup_network(orchestration),
        base=None,
        before_attempt=before_attempt,
        after_failure=after_failure,
    )
    try:
        steady = SteadySandbox(created.sandbox, config.retry)
        await steady.extend(config.setup_timeout_seconds + config.sandbox.orphan_grace_seconds)
        await put_repository(steady, _base(orchestration), "base")
        await _run_setup(steady, config)
        name = await _snapshot(runtime, orchestration, created.sandbox)
        if name is not None:
            # Before the lease ends, which removes the snapshots that are not written down.
            orchestration = await runtime.store.update(
                Orchestration,
                orchestration_key(orchestration.workflow_id),
                lambda it: it.evolve(base_snapshot=name),
                fence=held_by(run_id),
            )
    finally:
        await leasing.end(runtime, created.lease, config.retry, note="base prepared")
    return orchestration


async def discard_base(
    runtime: Runtime, orchestration: Orchestration, *, fence: Fence | None = None
) -> Orchestration:
    """Remove the prepared workspace, which no fork needs any more; a failure is only logged.

    It is taken out of use first: a run that takes the orchestration up prepares anew.

    Raises:
        OwnershipError: by the fence; nothing was done.
    """
    if orchestration.base_snapshot is None and not orchestration.stale_snapshots:
        return orchestration

    def out_of_use(it: Orchestration) -> Orchestration:
        if it.base_snapshot is None:
            return it
        stale = (*it.stale_snapshots, it.base_snapshot)
        return it.evolve(base_snapshot=None, stale_snapshots=stale)

    key = orchestration.key
    orchestration = await runtime.store.update(Orchestration, key, out_of_use, fence=fence)
    for name in orchestration.stale_snapshots:
        if await _discarded(runtime, orchestration, name):

            def without(it: Orchestration, name: str = name) -> Orchestration:
                return it.evolve(stale_snapshots=tuple(n for n in it.stale_snapshots if n != name))

            orchestration = await runtime.store.update(Orchestration, key, without)
    return orchestration


async def _discarded(runtime: Runtime, orchestration: Orchestration, name: str) -> bool:
    try:
        provider = runtime.provider(orchestration.provider)
        if isinstance(provider, Discarding):
            await patiently(orchestration.config.retry, lambda: provider.discard(name))
    except (ProviderError, ConfigError) as error:
        logger.warning(
            "snapshot %s of %s is left to the reaper: %s", name, orchestration.key, error
        )
        return False
    return True


async def put(sandbox: Sandbox, orchestration: Orchestration, fork_num: int) -> None:
    """Make a workspace ready in a sandbox that is no copy of the prepared base.

    Raises:
        AgentError: `SETUP_FAILED`.
        ProviderError: the sandbox failed.
    """
    if orchestration.config.setup_command is not None:
        _check_setup_network(orchestration, "the prepared snapshot is gone")
    await put_repository(sandbox, _base(orchestration), f"fork-{fork_num}")
    if orchestration.config.setup_command is not None:
        await _run_setup(sandbox, orchestration.config)


def _setup_network(orchestration: Orchestration) -> Network:
    wanted = orchestration.config.sandbox.setup_network
    return network_of(orchestration) if wanted == "same" else wanted


def _check_setup_network(orchestration: Orchestration, why: str) -> None:
    """A fork's own sandbox keeps the network that it was created with."""
    wanted, own = _setup_network(orchestration), network_of(orchestration)
    if wanted != own:
        msg = (
            f"{why}, so each fork would have to run setup_command itself, whose "
            f"sandbox.setup_network is {wanted} while the forks' network is {own}: set "
            f"sandbox.network to {wanted}, or use a sandbox.template that needs no setup_command"
        )
        raise AgentError(FailureClass.SETUP_FAILED, msg)


async def _run_setup(sandbox: Sandbox, config: OrchestrationConfig) -> None:
    result = await sandbox.run(
        Command(
            ["sh", "-c", config.setup_command or "true"],
            cwd=WORKSPACE,
            timeout_seconds=config.setup_timeout_seconds,
        )
    )
    if result.exit_code != 0:
        msg = f"setup_command exited with {result.exit_code}: {tail(result)}"
        raise AgentError(FailureClass.SETUP_FAILED, msg)


async def _snapshot(runtime: Runtime, orchestration: Orchestration, sandbox: Sandbox) -> str | None:
    provider = runtime.provider(orchestration.provider)
    try:
        return await patiently(orchestration.config.retry, lambda: provider.snapshot(sandbox))
    except ProviderError as error:
        if error.policy.fatal and error.kind is not ErrorKind.INVALID:
            raise
        why = str(error)
    _check_setup_network(orchestration, why)
    logger.warning("each fork runs setup_command itself: %s", why)
    return None


def _base(orchestration: Orchestration) -> Base:
    if orchestration.base_commit is None or orchestration.branch is None:
        msg = "the base commit is not pinned yet"
        raise AgentError(FailureClass.INTERNAL, msg)
    archive = _base_folder(orchestration) / ARCHIVE
    return Base(orchestration.base_commit, orchestration.branch, archive)


def _base_folder(orchestration: Orchestration) -> Path:
    return Path(orchestration.artifacts) / "base"
