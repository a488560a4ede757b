"""Counts what the model API charges one fork, from the API's own answers."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from sandbox_pipeline.agents.models import Prices, Tokens, price_of
from sandbox_pipeline.agents.usage import MessageUsage, as_mapping, as_text, parse_object
from sandbox_pipeline.records import Usage, Value

MAX_EVENT_BYTES = 1_000_000
MAX_ANSWER_BYTES = 20_000_000

logger = logging.getLogger(__name__)


class _Totals(Value):
    requests: int = 0
    input: int = 0
    output: int = 0
    cache_creation: int = 0
    cache_read: int = 0
    cost_usd: float = 0.0
    unpriced: bool = False
    model: str | None = None


class Meter:
    """Sums up the answers and compares with the budget.

    Args:
        prices: of the models.
        budget_usd: None: no limit.
        path: file on this machine in which the sums outlive a crash; None: they don't.

    Attributes:
        refused: a request was turned away because of the budget.
    """

    def __init__(self, prices: Prices, budget_usd: float | None, path: Path | None) -> None:
        self.refused = False
        self._prices = prices
        self._budget_usd = budget_usd
        self._path = path
        self._totals = _load(path)

    @property
    def requests(self) -> int:
        """Answers that were charged."""
        return self._totals.requests

    @property
    def model(self) -> str | None:
        """Of the latest answer."""
        return self._totals.model

    @property
    def cost_usd(self) -> float | None:
        """None where nothing was charged yet, or a model's price isn't known."""
        totals = self._totals
        return None if totals.unpriced or not totals.requests else totals.cost_usd

    @property
    def usage(self) -> Usage:
        """All that was charged; unknown where nothing was."""
        totals = self._totals
        if not totals.requests:
            return Usage()
        return Usage(
            input_tokens=totals.input,
            output_tokens=totals.output,
            cache_creation_input_tokens=totals.cache_creation,
            cache_read_input_tokens=totals.cache_read,
            cost_usd=self.cost_usd,
        )

    def progress(self, *parts: str) -> str:
        """One line for the live display: these parts, and the tokens so far."""
        totals = self._totals
        tokens = totals.input + totals.output + totals.cache_creation + totals.cache_read
        return ", ".join([*parts, *([f"{tokens / 1000:.1f}k tokens"] if tokens else [])])

    @property
    def exhausted(self) -> str:
        """Why no further request is allowed; empty while they are.

        Where a model's price isn't known, its answers count as nothing.
        """
        if self._budget_usd is None or self._totals.cost_usd < self._budget_usd:
            return ""
        spent = f"{self._totals.cost_usd:.4f} of {self._budget_usd:g} US dollars"
        return f"the budget of this fork is used up: {spent}"

    def dump(self) -> str:
        """The sums, for `restore`."""
        return self._totals.model_dump_json()

    def restore(self, sums: str) -> None:
        """Go on from sums that `dump` gave.

        Raises:
            ValueError: they are none.
        """
        self._totals = _Totals.model_validate_json(sums)

    def add(self, response: ResponseMeter) -> None:
        """Count one answer, also one that was broken off, but none that ended in an error."""
        if response.usage.tokens is not None and response.error is None:
            self.add_tokens(response.usage.model, response.usage.tokens)

    def add_tokens(self, model: str | None, tokens: Tokens) -> None:
        """Count the tokens of one answer."""
        totals = self._totals
        price = price_of(model, self._prices) if model else None
        self._totals = _Totals(
            requests=totals.requests + 1,
            input=totals.input + tokens.input,
            output=totals.output + tokens.output,
            cache_creation=totals.cache_creation + tokens.cache_creation,
            cache_read=totals.cache_read + tokens.cache_read,
            cost_usd=totals.cost_usd + (price.cost_usd(tokens) if price else 0.0),
            unpriced=totals.unpriced or price is None,
            model=model or totals.model,
        )
        self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(self.dump(), encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("%s: cannot be written: %s", self._path, error)


class ResponseMeter:
    """Reads the usage out of one answer's bytes as they pass, streamed or in one piece."""

    def __init__(self, content_type: str) -> None:
        self.usage = MessageUsage()
        self.error: str | None = None
        self._streamed = content_type.startswith("text/event-stream")
        self._held = bytearray()
        self._skipping = False

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        if not self._streamed:
            if len(self._held) <= MAX_ANSWER_BYTES:
                self._held += chunk
            return
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._held += line
            self._line()
        if len(self._held) + len(rest) > MAX_EVENT_BYTES:
            self._skipping = True
            self._held.clear()
        else:
            self._held += rest

    def finish(self) -> None:
        """No more comes."""
        if not self._streamed and len(self._held) <= MAX_ANSWER_BYTES:
            message = parse_object(self._held.decode("utf-8", "replace"))
            if message is not None:
                self.usage.whole(message)
        self._held.clear()

    def _line(self) -> None:
        line = bytes(self._held)
        self._held.clear()
        if self._skipping:
            self._skipping = False
            return
        if not line.startswith(b"data:"):
            return
        # Most events are pieces of text; only these three say anything about the charge.
        if b"message_" not in line and b"error" not in line:
            return
        event = parse_object(line[5:].decode("utf-8", "replace"))
        if event is None:
            return
        if event.get("type") == "error":
            error = as_mapping(event.get("error"))
            kind = as_text(error.get("type"), 100) or "error"
            self.error = f"{kind}: {as_text(error.get('message')) or ''}"
        else:
            self.usage.event(event)


def _load(path: Path | None) -> _Totals:
    if path is None:
        return _Totals()
    try:
        return _Totals.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _Totals()
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        logger.warning("%s: cannot be read, counting anew: %s", path, type(error).__name__)
        return _Totals()
