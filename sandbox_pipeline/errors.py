"""What can go wrong, and the one table that says what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FailureClass(StrEnum):
    """Why a fork ended as `failed`; stored with the fork and shown in its row."""

    CREATION_FAILED = "creation_failed"
    UNHEALTHY = "unhealthy"
    SETUP_FAILED = "setup_failed"
    AGENT_FAILED = "agent_failed"
    BAD_RESULT = "bad_result"
    SANDBOX_LOST = "sandbox_lost"
    SANDBOX_FULL = "sandbox_full"
    RATE_LIMITED = "rate_limited"
    AUTH = "auth"
    CONFIG = "config"
    LOST = "lost"
    INTERNAL = "internal"


class ErrorKind(StrEnum):
    """What a provider's answer means; adapters map every vendor error onto one of these."""

    AUTH = "auth"
    """The credential is missing, wrong or lacks the right (401, 403)."""
    INVALID = "invalid"
    """The request can never succeed as it stands (400, 409 without a match, 501)."""
    MISSING = "missing"
    """The template or snapshot to create from does not exist (404); nothing was created."""
    RATE_LIMITED = "rate_limited"
    """Too many requests or too many sandboxes (429); nothing was created."""
    UNAVAILABLE = "unavailable"
    """The provider refused for now and says that nothing was created (connection refused)."""
    AMBIGUOUS = "ambiguous"
    """A sandbox may exist: time-out, reset, 5xx, 409, an unreadable success."""
    GONE = "gone"
    """The sandbox no longer exists or no longer answers, confirmed by the provider."""
    EXHAUSTED = "exhausted"
    """This one sandbox has no room left, such as on its disk; others are not concerned."""
    HOST = "host"
    """This machine cannot do it: no isolation, disk full, too many open files."""


@dataclass(frozen=True)
class Policy:
    """What follows from one kind of provider error.

    Attributes:
        retry: whether the same operation may be tried again.
        reconcile: whether the provider's list must be read before trying again,
            because the failed operation may have created something.
        fatal: whether every other fork would fail alike, so that none is tried.
        failure_class: what the fork is marked with when no attempt is left.
    """

    retry: bool
    reconcile: bool
    fatal: bool
    failure_class: FailureClass


POLICIES: dict[ErrorKind, Policy] = {
    # kind                             retry  reconcile fatal  failure_class
    ErrorKind.AUTH: Policy(False, False, True, FailureClass.AUTH),
    ErrorKind.INVALID: Policy(False, False, True, FailureClass.CONFIG),
    ErrorKind.MISSING: Policy(False, False, True, FailureClass.CONFIG),
    ErrorKind.RATE_LIMITED: Policy(True, False, False, FailureClass.RATE_LIMITED),
    ErrorKind.UNAVAILABLE: Policy(True, False, False, FailureClass.CREATION_FAILED),
    ErrorKind.AMBIGUOUS: Policy(True, True, False, FailureClass.CREATION_FAILED),
    ErrorKind.GONE: Policy(True, False, False, FailureClass.SANDBOX_LOST),
    ErrorKind.EXHAUSTED: Policy(False, False, False, FailureClass.SANDBOX_FULL),
    ErrorKind.HOST: Policy(False, True, True, FailureClass.CREATION_FAILED),
}


class PipelineError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PipelineError):
    """Input that can't be run; the message names the field, the value and the remedy."""


class ConflictError(PipelineError):
    """A compare-and-set write lost against a newer version of the same record."""


class OwnershipError(PipelineError):
    """Another run owns the orchestration; the message names it."""


class BudgetError(PipelineError):
    """Too little money is left to start a fork; the message names the budget."""


class StoreError(PipelineError):
    """The state store can't be read or written; the message names it and the remedy."""


class ProviderError(PipelineError):
    """A sandbox provider failed (a command that fails inside a sandbox is a result, not this).

    Args:
        kind: what the failure means, see `ErrorKind`.
        message: for people, bounded, without secrets.
        retry_after_seconds: what the provider asked to wait, where it said so.
    """

    def __init__(
        self, kind: ErrorKind, message: str, *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_seconds = retry_after_seconds

    @property
    def policy(self) -> Policy:
        """The row of `POLICIES` that applies."""
        return POLICIES[self.kind]


class AgentError(PipelineError):
    """An agent could not be run or its answer not be read; the fork fails with `failure_class`."""

    def __init__(self, failure_class: FailureClass, message: str) -> None:
        super().__init__(message)
        self.failure_class = failure_class
