"""What a person types: one validated model for launchpad, YAML files, command line, schedules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self, cast

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from sandbox_pipeline.config_sections import (
    MODEL_NAME,
    AgentConfig,
    HealthCheckConfig,
    JudgeConfig,
    PublishConfig,
    RankingConfig,
    RateLimitConfig,
    RetryConfig,
    SandboxConfig,
    Section,
)
from sandbox_pipeline.errors import ConfigError

__all__ = [
    "DEMO_REPO",
    "SCHEDULE_FIELDS",
    "AgentConfig",
    "HealthCheckConfig",
    "JudgeConfig",
    "OrchestrationConfig",
    "PublishConfig",
    "RankingConfig",
    "RateLimitConfig",
    "RetryConfig",
    "SandboxConfig",
    "parse_config",
    "read_yaml",
]

WORKFLOW_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
DEMO_REPO = "demo"
SCHEDULE_FIELDS = ("cron", "timezone")
"""Of a named orchestration's file, beside the configuration itself."""


class OrchestrationConfig(Section):
    """One request: a prompt, a repository, and how many forks work on it under which limits."""

    workflow_id: str | None = Field(
        default=None,
        description="Name of this orchestration, [a-z0-9-]{1,63}. Running again with the same "
        "name resumes it. Empty: made from the run.",
    )
    repo_url: str = Field(
        default=DEMO_REPO,
        min_length=1,
        max_length=4096,
        description="Repository the forks work on: https://…, a local path, or 'demo', the small "
        "example that is made on the spot. Private: set GITHUB_TOKEN, never a token here.",
    )
    branch: str | None = Field(
        default=None,
        max_length=255,
        description="Branch to start from; empty: the repository's own.",
    )
    allow_file_urls: bool = Field(
        default=False, description="Accept file:// in repo_url (local paths need no permission)."
    )
    prompt: str = Field(
        ...,
        min_length=1,
        max_length=1_000_000,
        description="What the agent is asked to do; handed over byte for byte, as a file.",
    )
    num_forks: int = Field(default=3, ge=1, le=1000, description="How many attempts are made.")
    model: str = Field(
        default="sonnet",
        pattern=MODEL_NAME,
        description="Model the agent uses, by alias or full name.",
    )
    max_concurrent: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Most sandboxes of this orchestration alive at any time.",
    )
    budget_usd: float | None = Field(
        default=None,
        gt=0,
        description="Most US dollars all forks together, and the judge, may spend on the model. "
        "Each fork has agent.max_budget_usd of it reserved, else an equal share of what is left, "
        "and may spend no more; empty: no limit.",
    )
    daily_budget_usd: float | None = Field(
        default=None,
        gt=0,
        description="Do not start a fork that could bring what all orchestrations of this "
        "deployment spend in one day (UTC) above this; SANDBOX_PIPELINE_DAILY_BUDGET_USD says "
        "the same for every orchestration.",
    )
    setup_command: str | None = Field(
        default=None,
        min_length=1,
        description="Shell command run once in the workspace before it is copied for the forks, "
        "such as installing dependencies.",
    )
    setup_timeout_seconds: float = Field(
        default=1800,
        gt=0,
        le=86_400,
        description="Longest time setup_command may take, in seconds.",
    )
    verify_command: str | None = Field(
        default=None,
        min_length=1,
        description="Shell command that shows whether a patch is right, such as the tests: run in "
        "a fresh sandbox made from the base commit and the patch; exit code 0 means verified.",
    )
    verify_protect: list[str] = Field(
        default_factory=list,
        description="Files that a patch can't change where it is verified, as git's glob patterns "
        "such as tests/** or **/test_*.py: put back from the base commit before the command runs.",
    )
    verify_protect_runner: bool = Field(
        default=True,
        description="Also put back the files by which a patch could take over a test runner: "
        "conftest.py, sitecustomize.py, pytest.ini, tox.ini, *.pth and the like.",
    )
    verify_junit: str | None = Field(
        default=None,
        min_length=1,
        description="JUnit XML report that verify_command writes, relative to the workspace; its "
        "tests are counted, and one that failed rejects the patch.",
    )
    verify_timeout_seconds: float = Field(
        default=1800,
        gt=0,
        le=86_400,
        description="Longest time verify_command may take, in seconds; afterwards the patch is "
        "rejected.",
    )
    verify_network: Literal["none", "full"] = Field(
        default="none", description="What the verification's sandbox may reach."
    )
    stop_after_verified: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Once so many forks are verified the rest are cancelled; empty: never.",
    )
    publish: PublishConfig = Field(default_factory=PublishConfig)
    ranking: RankingConfig = Field(default_factory=RankingConfig)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    agent: AgentConfig
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    health_check: HealthCheckConfig = Field(default_factory=HealthCheckConfig)
    retry: RetryConfig = Field(default_factory=RetryConfig)
    rate_limit: RateLimitConfig = Field(default_factory=RateLimitConfig)
    fail_run_below_success_rate: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Fail the run when a smaller share of the forks succeeded; empty: never.",
    )
    max_patch_mb: float = Field(
        default=50,
        gt=0,
        le=10_000,
        description="How much of a fork's patch is kept, in MB (10^6 bytes); a larger one is cut "
        "and flagged.",
    )
    artifacts_dir: str | None = Field(
        default=None,
        description="Folder for patches, transcripts and logs; empty: SANDBOX_PIPELINE_ARTIFACTS, "
        "else 'artifacts' beside the Dagster instance.",
    )

    @field_validator("workflow_id")
    @classmethod
    def _workflow_id(cls, value: str | None) -> str | None:
        if value is not None and not WORKFLOW_ID.fullmatch(value):
            msg = "must be 1 to 63 of a-z, 0-9 and '-', not starting with '-'"
            raise ValueError(msg)
        return value

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if "\0" in value:
            msg = "must not contain a NUL byte"
            raise ValueError(msg)
        if not value.strip():
            msg = "must not be empty"
            raise ValueError(msg)
        return value

    @field_validator("verify_protect")
    @classmethod
    def _globs(cls, value: list[str]) -> list[str]:
        for glob in value:
            if not glob or "\0" in glob or glob.startswith("/") or ".." in glob.split("/"):
                msg = f"{glob!r} must be a pattern relative to the repository"
                raise ValueError(msg)
        return value

    @field_validator("verify_junit")
    @classmethod
    def _in_workspace(cls, value: str | None) -> str | None:
        parts = (value or "").split("/")
        if value is not None and ("\0" in value or value.startswith(("/", "-")) or ".." in parts):
            msg = "must be a path relative to the workspace"
            raise ValueError(msg)
        return value

    @field_validator("repo_url", "branch", "setup_command", "verify_command")
    @classmethod
    def _no_nul(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            msg = "must not contain a NUL byte"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _judge_counts(self) -> Self:
        if self.judge.enabled and self.ranking.judge == 0:
            msg = "judge.enabled: would cost money and decide nothing while ranking.judge is 0"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _something_verifies(self) -> Self:
        if self.stop_after_verified is not None and self.verify_command is None:
            msg = "stop_after_verified: needs verify_command, without which no fork is verified"
            raise ValueError(msg)
        return self


def parse_config(data: object, *, source: str = "configuration") -> OrchestrationConfig:
    """Validate plain data as an orchestration.

    Args:
        data: a mapping, as read from YAML, JSON or the launchpad.
        source: what the data came from, named in the error.

    Raises:
        ConfigError: one line for each wrong field: its path, the value, what is allowed.
    """
    if not isinstance(data, dict):
        msg = f"{source}: expected a mapping of fields, got {type(data).__name__}"
        raise ConfigError(msg)
    try:
        return OrchestrationConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, not validated yet.

    Raises:
        ConfigError: naming the file, which is missing, unreadable or no mapping.
    """
    try:
        data: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{path}: no such file"
        raise ConfigError(msg) from None
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read: {error}"
        raise ConfigError(msg) from error
    except yaml.YAMLError as error:
        msg = f"{path}: not valid YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path}: expected a mapping of fields, got {type(data).__name__}"
        raise ConfigError(msg)
    return {str(name): value for name, value in cast("dict[object, Any]", data).items()}


def _explain(error: ValidationError, source: str) -> str:
    lines: list[str] = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "configuration"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "is not a field of this configuration; see docs/configuration.md for the fields"
        elif item["type"] == "missing":
            text = "is required"
        else:
            text = f"{text} (got {_shown(item['input'])})"
        lines.append(f"{source}: {field}: {text}")
    return "\n".join(lines)


def _shown(value: object) -> str:
    text = repr(value)
    text = re.sub(r"(\w+://)[^/@\s'\"]*@", r"\1***@", text)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
