"""What a person types: one validated model for launchpad, YAML files, command line, schedules."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sandbox_pipeline.errors import ConfigError

WORKFLOW_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}$"
DEMO_REPO = "demo"
SCHEDULE_FIELDS = ("cron", "timezone")
"""Of a named orchestration's file, beside the configuration itself."""

Positive = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AgentConfig(_Section):
    """What works on the prompt inside the sandbox."""

    kind: str = Field(
        default="command",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Which agent works on the prompt: 'command' runs any command line; others "
        "plug in by the entry point group 'sandbox_pipeline.agents'.",
    )
    command: str | None = Field(
        default=None,
        description="Command line of the 'command' agent, split like a shell does but run without "
        "one. {prompt_file}, {workspace}, {model} and {fork_num} are replaced in each argument.",
    )
    usage_format: str = Field(
        default="none",
        pattern=r"^[a-z][a-z0-9-]*$",
        description="How the 'command' agent reports tokens and cost on its standard output: "
        "claude-stream-json, codex-jsonl, gemini-json, opencode-jsonl, mini-json or none.",
    )
    timeout_seconds: float = Field(
        default=7200,
        gt=0,
        le=86_400,
        description="Longest time the agent may work, in seconds. It is then interrupted and, "
        "5 seconds later, killed; the fork ends as 'timeout' and keeps its patch.",
    )
    idle_timeout_seconds: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Longest time an agent that runs inside the sandbox may go without any "
        "output, in seconds; it then ends as 'timeout'. Empty: no limit.",
    )
    max_turns: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="Most model turns of one fork, for agents with turns.",
    )
    max_budget_usd: float | None = Field(
        default=None,
        gt=0,
        description="Most US dollars one fork may spend on the model; empty: no limit.",
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the agent. Never put a secret here: it would be "
        "stored with the run; use env_from.",
    )
    env_from: list[str] = Field(
        default_factory=list,
        description="Names of this machine's environment variables to hand to the agent, "
        "secrets included. Their values are redacted from everything stored.",
    )
    max_output_mb: float = Field(
        default=100,
        gt=0,
        le=10_000,
        description="How much of each of the agent's output streams is kept, in MB (10^6 bytes); "
        "the rest is dropped and the fork flagged.",
    )
    allowed_tools: list[str] | None = Field(
        default=None,
        description="Tools that 'claude_code' may use, such as 'Edit' or 'Bash(git *)'; all others "
        "are refused. Empty: every tool.",
    )
    append_system_prompt: str | None = Field(
        default=None,
        max_length=100_000,
        description="Text that 'claude_code' and 'anthropic' add to the system prompt.",
    )
    mcp_config: str | None = Field(
        default=None,
        max_length=100_000,
        description="MCP servers of 'claude_code': JSON, or the path of a file inside the sandbox. "
        "Those that the repository names itself are never started.",
    )
    claude_binary: str | None = Field(
        default=None,
        description="Claude Code's program on this machine, for local sandboxes; empty: 'claude' "
        "from the PATH.",
    )

    @field_validator("command", mode="before")
    @classmethod
    def _join_argv(cls, value: Any) -> Any:
        if isinstance(value, list):
            return shlex.join(str(part) for part in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return value

    @field_validator("command")
    @classmethod
    def _command_splits(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "\0" in value:
            msg = "must not contain a NUL byte"
            raise ValueError(msg)
        try:
            argv = shlex.split(value)
        except ValueError as error:
            msg = f"is not a command line: {error}"
            raise ValueError(msg) from error
        if not argv:
            msg = "must not be empty"
            raise ValueError(msg)
        return value

    @field_validator("env_from")
    @classmethod
    def _env_names(cls, value: list[str]) -> list[str]:
        return [_checked_env_name(name) for name in value]

    @field_validator("env")
    @classmethod
    def _env_keys(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            _checked_env_name(name)
            if "\0" in text:
                msg = f"{name} must not contain a NUL byte"
                raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _command_given(self) -> Self:
        if self.kind == "command" and self.command is None:
            msg = (
                "command is required when kind is 'command', for example: "
                "python3 agent.py {prompt_file}"
            )
            raise ValueError(msg)
        return self


class SandboxConfig(_Section):
    """The isolated place each fork works in."""

    provider: str = Field(
        default="auto",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Where forks run: 'local' (bubblewrap on this machine), 'e2b', or 'auto': "
        "e2b when E2B_API_KEY is set and the provider is installed, else local.",
    )
    isolation: Literal["bubblewrap", "none"] = Field(
        default="bubblewrap",
        description="How the local provider isolates. 'none' runs the agent as you, with your "
        "files and network in reach: only for code and agents that you trust.",
    )
    network: Literal["auto", "none", "model_api", "full"] = Field(
        default="auto",
        description="What a sandbox may reach: nothing, the model's API only, or everything. "
        "'auto' is the least that the agent needs.",
    )
    key_injection: Literal["auto", "never"] = Field(
        default="auto",
        description="Keeping the model's key out of sandboxes without a local proxy: 'auto' has "
        "the provider put it on the sandbox's requests, where it can, and warns where it can't; "
        "'never' hands it to the agent's process.",
    )
    setup_network: Literal["same", "none", "full"] = Field(
        default="same",
        description="Network while setup_command runs; closed again before the agent starts.",
    )
    template: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_./:-]+$",
        description="Provider's image to start from; empty: the provider's default.",
    )
    orphan_grace_seconds: float = Field(
        default=600,
        ge=10,
        le=86_400,
        description="How long a sandbox lives on, in seconds, once nothing extends its life: the "
        "time in which a crashed run can be resumed and its agents re-attached.",
    )
    start_timeout_seconds: float = Field(
        default=300,
        ge=1,
        le=3600,
        description="Longest time one try at creating a sandbox may take, in seconds.",
    )
    cpu: float | None = Field(
        default=None,
        gt=0,
        le=256,
        description="CPU cores of each sandbox, where the provider can limit.",
    )
    memory_mb: int | None = Field(
        default=None,
        ge=64,
        le=1_048_576,
        description="Memory of each sandbox in MiB; empty: no limit.",
    )
    disk_mb: int | None = Field(
        default=None, ge=16, le=10_485_760, description="Disk space of each sandbox in MiB."
    )
    max_processes: int | None = Field(
        default=None, ge=8, le=1_000_000, description="Most processes alive in one sandbox."
    )
    read_only_paths: list[str] = Field(
        default_factory=list,
        description="Absolute paths of this machine to show inside local sandboxes, read-only, at "
        "the same place: toolchains outside /usr, caches.",
    )

    @field_validator("read_only_paths")
    @classmethod
    def _absolute(cls, value: list[str]) -> list[str]:
        for path in value:
            if not Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
                msg = f"{path!r} must be an absolute path without '..'"
                raise ValueError(msg)
        return value


class HealthCheckConfig(_Section):
    """The gate between a new sandbox and the agent."""

    command: str | None = Field(
        default=None,
        description="Shell command run in the workspace; exit code 0 means healthy. Empty: the "
        "workspace must be at the base commit and writable.",
    )
    attempts: int = Field(default=3, ge=1, le=100, description="How often the command is tried.")
    interval_seconds: float = Field(
        default=1, ge=0, le=600, description="Pause between two tries, in seconds."
    )
    timeout_seconds: float = Field(
        default=60, gt=0, le=3600, description="Longest time one try may take, in seconds."
    )


class RetryConfig(_Section):
    """How often a stage of a fork is tried when the provider fails."""

    attempts: int = Field(
        default=3, ge=1, le=20, description="Most tries of one stage of one fork."
    )
    initial_seconds: float = Field(
        default=1, ge=0, le=600, description="Pause before the second try."
    )
    factor: float = Field(
        default=2, ge=1, le=10, description="Each further pause is this times longer."
    )
    max_seconds: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="Longest pause. A provider that asks for a longer one (Retry-After) fails "
        "the fork as 'rate_limited'.",
    )


class RateLimitConfig(_Section):
    """How fast sandboxes may be created, over all runs that share the store."""

    starts: int = Field(default=5, ge=1, le=10_000, description="Most creations in any window.")
    window_ms: int = Field(
        default=1000, ge=1, le=3_600_000, description="Length of the window, in ms."
    )


class RankingConfig(_Section):
    """What decides between patches of which the same is known; each weight counts relatively."""

    tests: float = Field(default=16, ge=0, le=1000, description="Weight of: more tests passed.")
    judge: float = Field(
        default=8,
        ge=0,
        le=1000,
        description="Weight of: preferred by the judge, where there is one.",
    )
    size: float = Field(default=4, ge=0, le=1000, description="Weight of: a smaller change.")
    cost: float = Field(default=2, ge=0, le=1000, description="Weight of: a lower cost.")
    time: float = Field(default=1, ge=0, le=1000, description="Weight of: a faster agent.")


DEFAULT_RUBRIC = (
    "Prefer the patch that does all of what was asked, correctly, also in edge cases. Among those, "
    "prefer the one that is easier to read and to maintain and changes nothing without need. "
    "Length is no merit."
)


class JudgeConfig(_Section):
    """A model that compares patches which checks can't tell apart; see docs/deciding.md."""

    enabled: bool = Field(
        default=False,
        description="Let a model compare, pairwise, the patches that are ahead and equal in "
        "verification and tests passed. Sends prompt and patches to Anthropic's API, with "
        "ANTHROPIC_API_KEY, and costs money.",
    )
    model: str = Field(
        default="sonnet",
        pattern=MODEL_NAME,
        description="Model that judges, by alias or full name.",
    )
    rubric: str = Field(
        default=DEFAULT_RUBRIC,
        min_length=1,
        max_length=20_000,
        description="What makes one patch better than another.",
    )
    max_budget_usd: float | None = Field(
        default=1.0,
        gt=0,
        description="Most US dollars that the judge may spend on one orchestration, within "
        "budget_usd and the day's budget; empty: no limit of its own.",
    )
    max_comparisons: int = Field(
        default=30,
        ge=1,
        le=200,
        description="Most pairs of patches that are compared, each in both orders (two requests).",
    )
    timeout_seconds: float = Field(
        default=900,
        gt=0,
        le=86_400,
        description="Longest time the judge may take in all, in seconds; the ranking is then made "
        "without it.",
    )


class PublishConfig(_Section):
    """Where patches go once the winner is known: nowhere unless asked for."""

    to: Literal["none", "branch", "pull_request"] = Field(
        default="none",
        description="'branch' pushes to forks/{workflow_id}/{fork_num} of the repository, with "
        "GITHUB_TOKEN; 'pull_request' opens one on GitHub, too. Nothing is ever overwritten.",
    )
    forks: Literal["winner", "all"] = Field(
        default="winner", description="Whose patches: the winner's, or all that there are."
    )
    author_name: str = Field(
        default="sandbox-pipeline",
        pattern=r"^[^<>\x00-\x1f]{1,100}$",
        description="Author of the commit.",
    )
    author_email: str = Field(
        default="noreply@sandbox-pipeline.invalid",
        pattern=r"^[^<>\s\x00-\x1f]{1,200}$",
        description="The author's address.",
    )
    trailer: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z-]*: [^\x00-\x1f]{1,500}$",
        description="Trailer of the commit's message, such as 'Signed-off-by: A <a@b.c>'.",
    )


class OrchestrationConfig(_Section):
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


def _checked_env_name(name: str) -> str:
    if not ENV_NAME.fullmatch(name):
        msg = f"{name!r} is not the name of an environment variable"
        raise ValueError(msg)
    return name
