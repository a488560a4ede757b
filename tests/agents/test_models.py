"""Names and prices of models."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from sandbox_pipeline.agents.models import (
    ALIASES,
    PRICES,
    PRICES_AS_OF,
    Tokens,
    load_prices,
    price_of,
    prices_from_environ,
    resolve_model,
)
from sandbox_pipeline.errors import ConfigError


def test_aliases_lead_to_models_with_a_price() -> None:
    assert set(ALIASES) == {"sonnet", "opus", "haiku"}
    assert all(name in PRICES for name in ALIASES.values())
    assert resolve_model("claude-x") == "claude-x"
    datetime.date.fromisoformat(PRICES_AS_OF)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *(("sonnet", True), ("claude-haiku-4-5-20251001", True), ("claude-sonnet-5-5[1m]", True)),
        *(("claude-opus-4-5@20251101", True), ("gpt-5", False), ("claude-sonnet-9", False)),
        *(("", False), ("claude-sonnet-5-5-20", False)),
    ],
)
def test_price_is_found_by_any_usual_name(name: str, known: bool) -> None:
    assert (price_of(name) is not None) == known


def test_cost_counts_each_kind_at_its_price() -> None:
    price = PRICES["claude-sonnet-5-5"]
    million = 1_000_000
    assert price.cost_usd(Tokens(million, million, million, million)) == 2 + 10 + 2.5 + 0.1
    assert price.cost_usd(Tokens(cache_creation=million, cache_creation_1h=million)) == 4


def test_long_prompts_cost_more_where_the_model_has_such_a_price() -> None:
    price = PRICES["claude-haiku-5-5"]
    assert price.cost_usd(Tokens(input=100_000)) == pytest.approx(0.01)
    assert price.cost_usd(Tokens(input=1, cache_read=100_000)) == pytest.approx(0.0050005)


def test_own_prices_take_the_place_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(
        "claude-sonnet-5-5: {input: 1, output: 2, cache_creation: 3, cache_read: 4}\n"
        "mine: {input: 1, output: 1, cache_creation: 1, cache_read: 1, cache_creation_1h: 9}\n"
    )
    prices = load_prices(path)
    assert prices["claude-sonnet-5-5"].cache_creation_1h == 2
    assert prices["mine"].cache_creation_1h == 9
    assert prices["claude-opus-5"] == PRICES["claude-opus-5"]
    assert prices_from_environ({"SANDBOX_PIPELINE_PRICES": str(path)}) == prices
    assert prices_from_environ({}) is PRICES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "prices"),
        ("m: {input: 1}", "m.output"),
        ("m: {input: -1, output: 1, cache_creation: 1, cache_read: 1}", "m.input"),
        ("m: {input: .inf, output: 1, cache_creation: 1, cache_read: 1}", "m.input"),
        ("m: [", "not valid YAML"),
    ],
)
def test_wrong_prices_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_prices(path)


def test_missing_prices_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prices(tmp_path / "none.yaml")
