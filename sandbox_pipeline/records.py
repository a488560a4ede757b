"""Values that are stored and cross op boundaries; all frozen, unknown is `None`."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from sandbox_pipeline.clock import Instant
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import FailureClass


class Outcome(StrEnum):
    """How a fork stands; all but the first two are terminal, and terminal is final."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    BUDGET_EXCEEDED = "budget_exceeded"

    @property
    def is_terminal(self) -> bool:
        """Whether the outcome can no longer change."""
        return self not in (Outcome.PENDING, Outcome.RUNNING)


class Stage(StrEnum):
    """What a fork is doing; the order is that of the flow."""

    QUEUE = "queue"
    CREATE = "create"
    HEALTH = "health"
    AGENT = "agent"
    METRICS = "metrics"
    CLEANUP = "cleanup"
    DONE = "done"


class SandboxState(StrEnum):
    """How a sandbox stands; never overwrites its fork's outcome."""

    INTENT = "intent"
    UNKNOWN = "unknown"
    LIVE = "live"
    KILLING = "killing"
    GONE = "gone"


class Control(StrEnum):
    """What people asked of an orchestration, or of one fork (`PAUSE` is for the former only)."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


MAPPING_PREFIX = "fork_"


class Value(BaseModel):
    """Base of the parts of records."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Record(Value):
    """Base of what is stored under a state key.

    Attributes:
        version: the compare-and-set token; 0 for a record that was never stored.
    """

    kind: ClassVar[str]
    version: int = 0
    workflow_id: str

    @property
    def key(self) -> str:
        """The state key, such as `fork:my-workflow:0`."""
        raise NotImplementedError

    def evolve(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        return self.model_copy(update=changes)


class Usage(Value):
    """What the model charged for; `None` is unknown, never 0."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cost_usd: float | None = None


class AgentResult(Value):
    """What came of running the agent once.

    Attributes:
        outcome: `SUCCESS`, `FAILED`, `TIMEOUT`, `CANCELLED` or `BUDGET_EXCEEDED`.
        exit_code: of the agent's process as a shell reports it (128 + signal); `None` where
            there is no process.
        message: one line for people: the agent's last words or why it failed.
        model: the model that really answered, where the agent tells.
        cost_basis: `reported` by the agent, `computed` from tokens and prices, or `unknown`.
        output_truncated: more output came than `agent.max_output_mb`.
    """

    outcome: Outcome
    failure_class: FailureClass | None = None
    exit_code: int | None = None
    message: str = ""
    model: str | None = None
    agent_version: str | None = None
    turns: int | None = None
    usage: Usage = Field(default_factory=Usage)
    cost_basis: str = "unknown"
    output_truncated: bool = False
    secret_leak: bool = False


class Patch(Value):
    """What a fork changed against the base commit.

    Attributes:
        size_bytes: of the whole patch, also where only a part is kept.
        path: where it is kept on this machine.
    """

    files_changed: int
    insertions: int
    deletions: int
    size_bytes: int
    truncated: bool = False
    secret_leak: bool = False
    path: str | None = None


class Verdict(StrEnum):
    """What the verification of a patch showed."""

    VERIFIED = "verified"
    REJECTED = "rejected"
    UNVERIFIED = "unverified"
    """Nothing was shown: no verify_command, no patch, or no test was run."""
    ERROR = "error"
    """The verification itself failed."""


class Verification(Value):
    """What came of a fork's patch in a fresh sandbox.

    Attributes:
        exit_code: of `verify_command`; None where it was not run.
        tests_passed, tests_failed, tests_skipped: by the JUnit report; None without one.
        failed_tests: names of the first ones.
        restored: protected files that the patch changed and that were put back.
        log_path: the command's output on this machine.
    """

    outcome: Verdict
    reason: str = ""
    exit_code: int | None = None
    seconds: float | None = None
    tests_passed: int | None = None
    tests_failed: int | None = None
    tests_skipped: int | None = None
    failed_tests: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    log_path: str | None = None
    log_truncated: bool = False


class Published(Value):
    """Where a fork's patch was pushed to.

    Attributes:
        url: of the pull request; None for a branch only.
    """

    branch: str
    commit: str
    url: str | None = None


class Lease(Record):
    """That a sandbox exists or may exist, for whom, and until when.

    Attributes:
        lease_id: ours, made before the sandbox; also the provider's idempotency key.
        purpose: `fork`, `base` for the sandbox in which `setup_command` runs, `verify` for one
            in which a patch is verified.
        doubtful: some try at creating it had no clear answer, so there may be a second one.
    """

    kind: ClassVar[str] = "sandbox"

    lease_id: str
    fork_num: int | None
    attempt: int
    provider: str
    purpose: str = "fork"
    state: SandboxState = SandboxState.INTENT
    sandbox_id: str | None = None
    owner_run: str
    intent_at: Instant
    live_at: Instant | None = None
    gone_at: Instant | None = None
    expires_at: float | None = None
    doubtful: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        """See `Record.key`."""
        return self.intent_key if self.sandbox_id is None else sandbox_key(self.sandbox_id)

    @property
    def intent_key(self) -> str:
        """Its key until the provider has named the sandbox."""
        return sandbox_key(f"intent-{self.lease_id}")


class Timings(Value):
    """Seconds spent in each stage of a fork, monotonic; `None` where it never got there."""

    queue_seconds: float | None = None
    create_seconds: float | None = None
    health_seconds: float | None = None
    agent_seconds: float | None = None
    cleanup_seconds: float | None = None
    sandbox_seconds: float | None = None
    """Sandboxes of this fork alive, from the provider's answer to the confirmed end, summed."""


class Used(Value):
    """What a fork's last sandbox used; `None` where the provider doesn't tell.

    Attributes:
        usd_per_second: price of the sandbox by the provider's table.
    """

    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    disk_bytes: int | None = None
    usd_per_second: float | None = None


class Fork(Record):
    """One attempt at the prompt.

    Attributes:
        attempts: tries so far at each stage, by the stage's name; survives crashes.
        control: what people asked of this fork alone.
        budget_usd: what was reserved for it; its agent may spend no more.
        earlier_cost_usd: spent by attempts whose sandbox was lost, `result` apart.
    """

    kind: ClassVar[str] = "fork"

    fork_num: int
    outcome: Outcome = Outcome.PENDING
    failure_class: FailureClass | None = None
    message: str = ""
    stage: Stage = Stage.QUEUE
    attempts: dict[str, int] = Field(default_factory=dict)
    provider: str | None = None
    sandbox_id: str | None = None
    sandbox_state: SandboxState | None = None
    timings: Timings = Field(default_factory=Timings)
    used: Used = Field(default_factory=Used)
    result: AgentResult | None = None
    patch: Patch | None = None
    verification: Verification | None = None
    published: Published | None = None
    queued_at: Instant | None = None
    started_at: Instant | None = None
    agent_started_at: Instant | None = None
    ended_at: Instant | None = None
    total_seconds: float | None = None
    run_id: str | None = None
    progress: str = ""
    cost_so_far_usd: float | None = None
    control: Control = Control.RUN
    budget_usd: float | None = None
    earlier_cost_usd: float | None = None

    @property
    def key(self) -> str:
        """See `Record.key`."""
        return fork_key(self.workflow_id, self.fork_num)

    @property
    def mapping_key(self) -> str:
        """The fork's name in the Dagster run and in the artifacts folder."""
        return mapping_key(self.fork_num)


class Owner(Value):
    """The run that works on an orchestration now.

    Attributes:
        epoch: counts the owners; a former one sees that it was replaced.
        pid, boot: where the run's worker lives, so that its death is seen at once nearby.
        pid_started: start time of that process in clock ticks, since pids are used again.
        silent_seconds: without a heartbeat for so long it counts as dead.
    """

    run_id: str
    epoch: int
    pid: int
    boot: str
    pid_started: str
    heartbeat: Instant
    silent_seconds: float = 60.0


class Failure(Value):
    """A failure that befalls the whole orchestration."""

    failure_class: FailureClass
    message: str


class Opinion(Value):
    """One answer of the judge: two patches, shown in this order.

    Attributes:
        first, second: the forks.
        pick: the fork whose patch is better; None where neither is, or the answer was unusable.
        usable: whether the answer was one of those asked for.
        reason: in one line, without secrets; why it is unusable where it is.
    """

    first: int
    second: int
    pick: int | None = None
    usable: bool = True
    reason: str = ""


class Judging(Value):
    """How far the judge is with an orchestration, and what it said.

    Attributes:
        model: as configured.
        entrants: the forks whose patches are compared, one for each different change.
        pairs: what is compared with what, each in both orders.
        partial: entrants of which only a part was shown.
        sums: what was counted of tokens and cost, to go on from.
        setback: why its opinions don't count, for people; empty while they do.
        ended: nothing more is asked.
    """

    model: str
    entrants: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    partial: tuple[int, ...] = ()
    opinions: tuple[Opinion, ...] = ()
    usage: Usage = Field(default_factory=Usage)
    sums: str = ""
    setback: str = ""
    ended: bool = False


class Orchestration(Record):
    """One request and how far it is.

    Attributes:
        base_commit: what every fork starts from, pinned at the first run.
        base_snapshot: the provider's name of the prepared workspace, after `setup_command`.
        stale_snapshots: former ones that no fork will use, while they may still exist.
        fatal: set when no further fork can succeed; the run fails with it.
        judging: None where no judge was asked.
    """

    kind: ClassVar[str] = "orchestration"

    config: OrchestrationConfig
    provider: str
    network: str
    artifacts: str
    base_commit: str | None = None
    branch: str | None = None
    base_snapshot: str | None = None
    stale_snapshots: tuple[str, ...] = ()
    owner: Owner | None = None
    control: Control = Control.RUN
    fatal: Failure | None = None
    complete: bool = False
    judging: Judging | None = None
    requested_at: Instant
    completed_at: Instant | None = None

    @property
    def key(self) -> str:
        """See `Record.key`."""
        return orchestration_key(self.workflow_id)


class Metrics(Record):
    """The summary of one orchestration, as in the asset `orchestration_summary`."""

    kind: ClassVar[str] = "metrics"

    summary: dict[str, Any]

    @property
    def key(self) -> str:
        """See `Record.key`."""
        return metrics_key(self.workflow_id)


class Deployment(Record):
    """The name of the store itself; belongs to no orchestration."""

    kind: ClassVar[str] = "deployment"
    KEY: ClassVar[str] = "deployment"

    name: str

    @property
    def key(self) -> str:
        """See `Record.key`."""
        return self.KEY


class Event(Value):
    """Something that happened; kept in order.

    Attributes:
        seq: place in the order of the whole store; 0 before it is stored.
    """

    name: str
    workflow_id: str
    fork_num: int | None = None
    time: float
    payload: dict[str, Any] = Field(default_factory=dict)
    seq: int = 0


class ForkRef(Value):
    """Which fork. The store has the rest."""

    workflow_id: str
    fork_num: int


def orchestration_key(workflow_id: str) -> str:
    """State key of an orchestration."""
    return f"orchestration:{workflow_id}"


def mapping_key(fork_num: int) -> str:
    """A fork's name in the Dagster run and in the artifacts folder, such as `fork_003`."""
    return f"{MAPPING_PREFIX}{fork_num:03d}"


def fork_num_of(name: str) -> int:
    """The fork that `mapping_key` names."""
    return int(name.removeprefix(MAPPING_PREFIX))


def fork_key(workflow_id: str, fork_num: int) -> str:
    """State key of a fork."""
    return f"fork:{workflow_id}:{fork_num}"


def sandbox_key(sandbox_id: str) -> str:
    """State key of a sandbox."""
    return f"sandbox:{sandbox_id}"


def metrics_key(workflow_id: str) -> str:
    """State key of an orchestration's metrics."""
    return f"metrics:{workflow_id}"
