"""When to try again: one rule for every stage and every provider."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandbox_pipeline.config import RetryConfig
from sandbox_pipeline.errors import ProviderError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def pause_seconds(retry: RetryConfig, attempt: int) -> float:
    """The pause after the given attempt (1-based): 1, 2, 4 … by default, at most `max_seconds`."""
    exponent = min(attempt - 1, 64)
    return min(retry.max_seconds, retry.initial_seconds * retry.factor**exponent)


def next_pause(retry: RetryConfig, error: ProviderError, attempt: int) -> float | None:
    """Seconds to wait before the next attempt, or None to give up.

    Gives up when the error's policy says so, when no attempt is left, and when the provider
    asks to wait for longer than `retry.max_seconds`.
    """
    if not error.policy.retry or attempt >= retry.attempts:
        return None
    asked = error.retry_after_seconds or 0.0
    if asked > retry.max_seconds:
        return None
    return max(asked, pause_seconds(retry, attempt))


def _always(error: ProviderError) -> bool:
    return True


async def patiently(
    retry: RetryConfig,
    call: Callable[[], Awaitable[T]],
    *,
    repeatable: Callable[[ProviderError], bool] = _always,
) -> T:
    """Repeat a call as `retry` and the table of errors allow.

    Args:
        retry: how often and after which pauses.
        call: what to do; must be safe to repeat after an error that is `repeatable`.
        repeatable: whether this call may be repeated after this error at all.

    Raises:
        ProviderError: that of the last attempt.
    """
    attempt = 1
    while True:
        try:
            return await call()
        except ProviderError as error:
            pause = next_pause(retry, error, attempt) if repeatable(error) else None
            if pause is None:
                raise
            logger.info("attempt %d failed, next in %.1f s: %s", attempt, pause, error)
        attempt += 1
        await asyncio.sleep(pause)
