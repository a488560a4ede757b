"""Every way in which the E2B SDK fails, mapped onto `ErrorKind` by one table.

The SDK has several bases of exceptions, lets bare httpx and JSON errors through, and drops the
answer's headers. What E2B really said is therefore read from the answer itself, which the frame
that raised still holds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, cast

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.redaction import Redactor

MAX_MESSAGE_CHARS = 500
MAX_BODY_BYTES = 10_000
"""Of an error's body, how much is looked at for a message."""


class Call(StrEnum):
    """What a failed call was about; the same answer means different things for each."""

    CREATE = "create"
    SANDBOX = "sandbox"
    ACCOUNT = "account"


@dataclass(frozen=True)
class Meaning:
    """One row: what an error means when creating, for one sandbox, for the account."""

    create: ErrorKind
    sandbox: ErrorKind
    account: ErrorKind

    def of(self, call: Call) -> ErrorKind:
        """The kind for this call."""
        return {
            Call.CREATE: self.create,
            Call.SANDBOX: self.sandbox,
            Call.ACCOUNT: self.account,
        }[call]


def _always(kind: ErrorKind) -> Meaning:
    return Meaning(kind, kind, kind)


AUTH = _always(ErrorKind.AUTH)
INVALID = _always(ErrorKind.INVALID)
RATE_LIMITED = _always(ErrorKind.RATE_LIMITED)
NOT_SENT = _always(ErrorKind.UNAVAILABLE)
DOUBTFUL = Meaning(ErrorKind.AMBIGUOUS, ErrorKind.UNAVAILABLE, ErrorKind.UNAVAILABLE)
FULL = Meaning(ErrorKind.AMBIGUOUS, ErrorKind.EXHAUSTED, ErrorKind.UNAVAILABLE)
ENDED = Meaning(ErrorKind.AMBIGUOUS, ErrorKind.GONE, ErrorKind.UNAVAILABLE)
NOT_FOUND = Meaning(ErrorKind.MISSING, ErrorKind.GONE, ErrorKind.INVALID)

# The first row whose name is among those of the exception and its bases.
EXCEPTIONS: tuple[tuple[str, Meaning], ...] = (
    ("e2b.exceptions.AuthenticationException", AUTH),
    ("e2b.exceptions.RateLimitException", RATE_LIMITED),
    ("e2b.exceptions.InvalidArgumentException", INVALID),
    ("e2b.exceptions.NotEnoughSpaceException", FULL),
    ("e2b.exceptions.SandboxNotRunningException", ENDED),
    ("e2b.exceptions.SandboxNotFoundException", ENDED),
    # Also where nothing was answered: the request was never written.
    ("httpx.ConnectError", NOT_SENT),
    ("httpx.ConnectTimeout", NOT_SENT),
    ("httpx.UnsupportedProtocol", INVALID),
    ("httpx.InvalidURL", INVALID),
)
# By HTTP status, for whatever was raised with an answer at hand.
STATUSES: Mapping[int, Meaning] = {
    400: INVALID,
    401: AUTH,
    402: AUTH,
    403: AUTH,
    404: NOT_FOUND,
    408: DOUBTFUL,
    409: DOUBTFUL,
    425: DOUBTFUL,
    429: RATE_LIMITED,
    501: INVALID,
}
OTHER_4XX = INVALID
OTHERWISE = DOUBTFUL
"""Time-outs, resets, 5xx, an unreadable success, and whatever else the SDK may raise."""


class _Answer(Protocol):
    status_code: int
    headers: Mapping[str, str]
    content: bytes


def provider_error(
    error: BaseException, call: Call, doing: str, redactor: Redactor
) -> ProviderError:
    """What an exception of the SDK means.

    Args:
        error: as it was caught, with its traceback.
        call: what the call was about.
        doing: for people, such as `create a sandbox`.
        redactor: takes secrets out of the message.
    """
    if isinstance(error, ProviderError):
        return error
    answer = _answer(error)
    kind = _meaning(error, answer).of(call)
    text = f"E2B could not {doing}: {_reason(error, answer)}"
    if kind is ErrorKind.AUTH:
        text += " (the key in E2B_API_KEY; see https://e2b.dev/dashboard?tab=keys)"
    return ProviderError(
        kind, _bounded(redactor.text(text)), retry_after_seconds=_retry_after(answer)
    )


def _meaning(error: BaseException, answer: _Answer | None) -> Meaning:
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}
    for name, meaning in EXCEPTIONS:
        if name in names:
            return meaning
    status = answer.status_code if answer is not None else getattr(error, "status_code", None)
    if not isinstance(status, int):
        return OTHERWISE
    return STATUSES.get(int(status), OTHER_4XX if 400 <= status < 500 else OTHERWISE)


def _answer(error: BaseException) -> _Answer | None:
    """The HTTP answer that led to the exception.

    The SDK's exceptions don't carry it (no Retry-After, and for an answer that is not the JSON it
    expects not even the status), but the frames that raised hold it as a local variable.
    """
    found: _Answer | None = None
    for frame in _frames(error.__traceback__):
        for name in ("response", "res", "r"):
            value = frame.get(name)
            if all(hasattr(value, part) for part in ("status_code", "headers", "content")):
                found = cast("_Answer", value)
    return found


def _frames(traceback: TracebackType | None) -> Iterator[Mapping[str, Any]]:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "e2b":
            yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _reason(error: BaseException, answer: _Answer | None) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if answer is None:
        text = str(error)[:MAX_BODY_BYTES]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    status = int(answer.status_code)
    body = answer.content
    if status < 400:
        return f"it answered {status} with an unreadable body of {len(body)} bytes"
    message = _message(body)
    if message is None:
        kind = answer.headers.get("content-type", "no type").partition(";")[0]
        return f"HTTP {status} with {len(body)} bytes of {kind}"
    return f"HTTP {status}: {message}"


def _message(body: bytes) -> str | None:
    if len(body) > MAX_BODY_BYTES:
        return None
    with contextlib.suppress(ValueError):
        parsed = json.loads(body)
        if isinstance(parsed, dict):
            message = cast("dict[str, object]", parsed).get("message")
            return message if isinstance(message, str) else None
    return None


def _bounded(text: str) -> str:
    text = " ".join(text.split())
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    return f"{text[: MAX_MESSAGE_CHARS - 1]}…"


def _retry_after(answer: _Answer | None) -> float | None:
    value = answer.headers.get("retry-after") if answer is not None else None
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return seconds if 0 <= seconds < 1e9 else None
    with contextlib.suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None
