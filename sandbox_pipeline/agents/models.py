"""Names and prices of Anthropic's models, dated; a person can replace the prices by a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sandbox_pipeline.errors import ConfigError

PRICES_AS_OF = "2026-11-23"
PRICES_SOURCE = "https://platform.claude.com/docs/en/about-claude/pricing"
PRICES_VARIABLE = "SANDBOX_PIPELINE_PRICES"

ALIASES = {
    "sonnet": "claude-sonnet-5-5",
    "opus": "claude-opus-5-5",
    "haiku": "claude-haiku-5-5",
}
_SUFFIX = re.compile(r"(?:[-@]20\d{6})?(?:-latest)?(?:\[\d+m\])?$")


@dataclass(frozen=True)
class Tokens:
    """Tokens of one request.

    Attributes:
        cache_creation_1h: the part of `cache_creation` that is kept for an hour, which costs
            more than the usual five minutes.
    """

    input: int = 0
    output: int = 0
    cache_creation: int = 0
    cache_read: int = 0
    cache_creation_1h: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.input + other.input,
            self.output + other.output,
            self.cache_creation + other.cache_creation,
            self.cache_read + other.cache_read,
            self.cache_creation_1h + other.cache_creation_1h,
        )

    @property
    def prompt(self) -> int:
        """All that went in, cached or not."""
        return self.input + self.cache_creation + self.cache_read


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens.

    Attributes:
        long_prompt: the price of a request whose prompt has more than `long_prompt_tokens`.
    """

    input: float
    output: float
    cache_creation: float
    cache_read: float
    cache_creation_1h: float
    long_prompt_tokens: int | None = None
    long_prompt: Price | None = None

    def cost_usd(self, tokens: Tokens) -> float:
        """What one request costs."""
        if (
            self.long_prompt is not None
            and self.long_prompt_tokens is not None
            and tokens.prompt > self.long_prompt_tokens
        ):
            return self.long_prompt.cost_usd(tokens)
        hour = min(tokens.cache_creation_1h, tokens.cache_creation)
        per_million = (
            tokens.input * self.input
            + tokens.output * self.output
            + (tokens.cache_creation - hour) * self.cache_creation
            + hour * self.cache_creation_1h
            + tokens.cache_read * self.cache_read
        )
        return per_million / 1_000_000


Prices = Mapping[str, Price]

_OPUS_5 = Price(5, 25, 6.25, 0.5, 10)
_SONNET_4 = Price(3, 15, 3.75, 0.3, 6)
PRICES: Prices = {
    "claude-fable-5-2": Price(8, 40, 10, 0.2, 16),
    "claude-fable-5-1": Price(10, 50, 12.5, 0.25, 20),
    "claude-fable-5": Price(10, 50, 12.5, 1, 20),
    "claude-opus-5-5": Price(4, 20, 5, 0.2, 8),
    "claude-opus-5": _OPUS_5,
    "claude-opus-4-8": _OPUS_5,
    "claude-opus-4-7": _OPUS_5,
    "claude-opus-4-6": _OPUS_5,
    "claude-opus-4-5": _OPUS_5,
    "claude-opus-4-1": Price(15, 75, 18.75, 1.5, 30),
    "claude-sonnet-5-5": Price(2, 10, 2.5, 0.1, 4),
    "claude-sonnet-5": Price(2, 10, 2.5, 0.2, 4),
    "claude-sonnet-4-6": _SONNET_4,
    "claude-sonnet-4-5": _SONNET_4,
    "claude-haiku-5-5": Price(0.1, 0.5, 0.125, 0.01, 0.2, 100_000, Price(0.5, 2.5, 0.625, 0.05, 1)),
    "claude-haiku-4-5": Price(1, 5, 1.25, 0.1, 2),
}


def resolve_model(name: str) -> str:
    """The full name of a model given by alias; any other name as it is."""
    return ALIASES.get(name, name)


def price_of(model: str, prices: Prices = PRICES) -> Price | None:
    """The price of a model by alias or full name, dated or not; None where it isn't known."""
    name = resolve_model(model)
    return prices.get(name) or prices.get(_SUFFIX.sub("", name))


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: Amount
    output: Amount
    cache_creation: Amount
    cache_read: Amount
    cache_creation_1h: Amount | None = None


_FILE = TypeAdapter(dict[str, _FileEntry])


def load_prices(path: Path | None) -> Prices:
    """The built-in prices, with those of a YAML file in their place.

    The file maps a model's full name to `input`, `output`, `cache_creation` and `cache_read`
    (and `cache_creation_1h`, by default twice `input`), in US dollars per million tokens.

    Raises:
        ConfigError: naming the file and the first wrong entry.
    """
    if path is None:
        return PRICES
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = _FILE.validate_python(data)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read: {error}"
        raise ConfigError(msg) from error
    except yaml.YAMLError as error:
        msg = f"{path}: not valid YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        needed = "input, output, cache_creation, cache_read in USD per million tokens"
        msg = f"{path}: {where or 'prices'}: {first['msg']}; each model needs {needed}"
        raise ConfigError(msg) from None
    own = {
        name: Price(
            entry.input,
            entry.output,
            entry.cache_creation,
            entry.cache_read,
            2 * entry.input if entry.cache_creation_1h is None else entry.cache_creation_1h,
        )
        for name, entry in entries.items()
    }
    return {**PRICES, **own}


def prices_from_environ(environ: Mapping[str, str]) -> Prices:
    """The prices, with those of the file that the variable `PRICES_VARIABLE` names.

    Raises:
        ConfigError: as `load_prices`.
    """
    path = environ.get(PRICES_VARIABLE)
    return load_prices(Path(path) if path else None)
