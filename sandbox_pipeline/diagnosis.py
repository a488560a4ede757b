"""Whether this machine can run a configuration, and what would help where it can't."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

from sandbox_pipeline import plugins, preparation
from sandbox_pipeline.agents.anthropic_client import SDK_VARIABLES
from sandbox_pipeline.agents.base import Agent, SelfCheckingAgent
from sandbox_pipeline.agents.model_checks import check_model_api
from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import ConfigError, PipelineError
from sandbox_pipeline.redaction import SECRET_VARIABLES
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import Planned, SelfChecking
from sandbox_pipeline.workspace.mirror import read_branches


async def diagnose(runtime: Runtime, config: OrchestrationConfig) -> list[Check]:
    """All checks that concern this configuration; none raises."""
    return [
        _python(),
        _git(),
        _store(runtime),
        _instance(runtime),
        *_keys(runtime),
        *await _agent(runtime, config),
        *await _judge(runtime, config),
        *await _provider(runtime, config),
        await _repository(runtime, config),
        *_plan(runtime, config),
    ]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} at {sys.executable}")


def _git() -> Check:
    try:
        out = subprocess.run(["git", "--version"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return Check("git", "failed", f"git does not run: {error}", "install git 2.28 or newer")
    return Check("git", "ok", out.stdout.strip())


def _store(runtime: Runtime) -> Check:
    url = runtime.settings.db_url
    # The runtime opened it, and brought its schema up to date, or we would not be here.
    return Check("store", "ok", url if url.startswith("sqlite") else url.split("@")[-1])


def _instance(runtime: Runtime) -> Check:
    home = runtime.settings.home
    if not os.access(home, os.W_OK):
        return Check("instance", "failed", f"{home} is not writable", "set DAGSTER_HOME")
    return Check("instance", "ok", str(home))


def _keys(runtime: Runtime) -> list[Check]:
    checks: list[Check] = []
    for name in SECRET_VARIABLES:
        value = runtime.environ.get(name)
        if not value:
            continue
        if value != value.strip() or any(char.isspace() for char in value):
            checks.append(
                Check(name, "failed", "is set, but has white space in it", f"set {name} again")
            )
        else:
            checks.append(Check(name, "ok", "is set"))
    return checks


async def _agent(runtime: Runtime, config: OrchestrationConfig) -> list[Check]:
    name = f"agent {config.agent.kind}"
    try:
        agent: Agent = runtime.agent(config.agent.kind)
    except ConfigError as error:
        return [Check(name, "failed", str(error), "change agent.kind")]
    provider = plugins.resolve_provider(config, runtime.environ)
    checks: list[Check] = []
    if isinstance(agent, SelfCheckingAgent):
        checks += await agent.diagnose(
            config.agent, config.model, runtime.environ, provider=provider
        )
    try:
        agent.validate(config.agent, runtime.environ, provider=provider)
    except ConfigError as error:
        told = any(check.finding == str(error) for check in checks)
        remedy = "change the configuration or the environment"
        return checks if told else [Check(name, "failed", str(error), remedy), *checks]
    return [Check(name, "ok", f"needs network '{agent.network}'"), *checks]


async def _judge(runtime: Runtime, config: OrchestrationConfig) -> list[Check]:
    if not config.judge.enabled:
        return []
    found = await check_model_api(runtime.environ, config.judge.model, variables=SDK_VARIABLES)
    return [
        replace(
            check,
            name=f"judge: {check.name}",
            remedy="change judge.model" if check.remedy == "change model" else check.remedy,
        )
        for check in found
    ]


async def _provider(runtime: Runtime, config: OrchestrationConfig) -> list[Check]:
    chosen = plugins.resolve_provider(config, runtime.environ)
    name = f"provider {chosen}"
    try:
        provider = runtime.provider(chosen)
    except ConfigError as error:
        return [Check(name, "failed", str(error), "change sandbox.provider or the environment")]
    how = "by sandbox.provider: auto" if config.sandbox.provider == "auto" else "by name"
    checks = [Check(name, "ok", f"chosen {how}")]
    if isinstance(provider, SelfChecking):
        checks += await provider.diagnose(config.sandbox)
    return checks


async def _repository(runtime: Runtime, config: OrchestrationConfig) -> Check:
    try:
        source = preparation.check_repository(config, runtime.settings.home)
        folder = runtime.settings.home / "doctor"
        branches = await read_branches(source, config.branch, folder, runtime.environ)
    except PipelineError as error:
        return Check("repository", "failed", str(error), "change repo_url or branch")
    return Check("repository", "ok", f"{config.repo_url}, branch {branches}")


def _plan(runtime: Runtime, config: OrchestrationConfig) -> list[Check]:
    limit = config.rate_limit
    seconds = config.num_forks / limit.starts * limit.window_ms / 1000
    at_once = min(config.num_forks, config.max_concurrent)
    checks = [
        Check(
            "plan",
            "ok",
            f"{config.num_forks} forks, at most {at_once} sandboxes at once; the rate limit alone "
            f"spreads their starts over at least {seconds:.0f} s",
        )
    ]
    try:
        provider = runtime.provider(plugins.resolve_provider(config, runtime.environ))
    except ConfigError:
        return checks
    if not isinstance(provider, Planned):
        return checks
    plan = provider.smallest_plan
    too_much: list[tuple[str, str]] = []
    if at_once > plan.concurrent:
        too_much.append((f"{plan.concurrent} sandboxes at once", "lower max_concurrent"))
    if limit.starts / limit.window_ms * 1000 > plan.creates_per_second and config.num_forks > 1:
        starts = f"{plan.creates_per_second:g} start a second"
        too_much.append((starts, "set rate_limit.starts: 1 with window_ms: 1000"))
    longest = max(config.agent.timeout_seconds, config.setup_timeout_seconds)
    if longest > plan.life_seconds:
        life = f"a sandbox's life of {plan.life_seconds / 3600:g} h"
        too_much.append((life, "lower agent.timeout_seconds and setup_timeout_seconds"))
    return checks + [
        Check("plan", "warning", f"more than {plan.name} allows: {what}", f"{remedy}, or upgrade")
        for what, remedy in too_much
    ]
