"""What other agents' outputs say of tokens and cost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sandbox_pipeline.agents.usage import PARSERS, Report, as_cost, as_count, parse_usage
from sandbox_pipeline.records import Usage


def lines(*events: dict[str, Any]) -> str:
    return "starting\n" + "\n".join(map(json.dumps, events)) + "\n"


def usage(
    *,
    tokens: tuple[int | None, int | None, int | None, int | None],
    cost_usd: float | None = None,
) -> Usage:
    return Usage(
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        cache_creation_input_tokens=tokens[2],
        cache_read_input_tokens=tokens[3],
        cost_usd=cost_usd,
    )


CLAUDE = lines(
    {"type": "system", "subtype": "init", "model": "claude-sonnet-5-5"},
    {
        "type": "result",
        "num_turns": 4,
        "total_cost_usd": 0.25,
        "usage": {"input_tokens": 1, "output_tokens": 2, "cache_creation_input_tokens": 3},
    },
)
CODEX = lines(
    {"type": "thread.started", "thread_id": "t"},
    {"type": "turn.completed", "usage": {"input_tokens": 10, "output_tokens": 1}},
    {
        "type": "turn.completed",
        "usage": {"input_tokens": 100, "cached_input_tokens": 60, "output_tokens": 5},
    },
)
GEMINI = "Loaded cached credentials.\n" + json.dumps(
    {
        "response": "done",
        "stats": {
            "models": {
                "gemini-pro": {
                    "api": {"totalRequests": 3},
                    "tokens": {"prompt": 100, "candidates": 10, "cached": 40, "thoughts": 5},
                },
                "gemini-flash": {"api": {"totalRequests": 1}, "tokens": {"prompt": 7}},
            }
        },
    },
    indent=2,
)
OPENCODE = lines(
    {"type": "step_start", "part": {}},
    *(
        {
            "type": "step_finish",
            "part": {
                "cost": 0.125,
                "tokens": {
                    "input": 5,
                    "output": 2,
                    "reasoning": 1,
                    "cache": {"read": 9, "write": 4},
                },
            },
        }
        for _ in range(2)
    ),
)
MINI = json.dumps({"info": {"model_stats": {"instance_cost": 0.5, "api_calls": 6}}})


@pytest.mark.parametrize(
    ("usage_format", "output", "expected"),
    [
        (
            "claude-stream-json",
            CLAUDE,
            Report(usage(tokens=(1, 2, 3, None), cost_usd=0.25), 4, "claude-sonnet-5-5"),
        ),
        ("codex-jsonl", CODEX, Report(usage(tokens=(40, 5, None, 60)), 2)),
        ("gemini-json", GEMINI, Report(usage(tokens=(67, 15, None, 40)), 4, "gemini-pro")),
        ("opencode-jsonl", OPENCODE, Report(usage(tokens=(10, 6, 8, 18), cost_usd=0.25), 2)),
        ("mini-json", MINI, Report(usage(tokens=(None, None, None, None), cost_usd=0.5), 6)),
        ("none", MINI, Report()),
    ],
)
def test_output_is_read(usage_format: str, output: str, expected: Report) -> None:
    assert parse_usage(usage_format, output) == expected


@pytest.mark.parametrize("usage_format", PARSERS)
@pytest.mark.parametrize(
    "output",
    [
        *(
            "",
            "\n\n",
            "no json",
            "{",
            "{}",
            "[1]",
            '{"type": "result"}',
            "{" * 5000,
            "\0",
            "[" * 100_000,
        ),
        *('{"stats": 3}', '{"stats": {"models": []}}', '{"info": [], "type": "turn.completed"}'),
        '{"type": "step_finish", "part": {"tokens": {"cache": 1}, "cost": "free"}}',
        '{"type": "turn.completed", "usage": {"input_tokens": -5, "output_tokens": "many"}}',
        '{"type": "result", "total_cost_usd": Infinity, "usage": {"input_tokens": 1.5}}',
        '{"info": {"model_stats": {"instance_cost": -1, "api_calls": null}}}',
        '{"stats": {"models": {"m": {"tokens": {"prompt": true, "candidates": -1}}}}}',
    ],
)
def test_garbage_is_unknown_never_zero(usage_format: str, output: str) -> None:
    report = parse_usage(usage_format, output)
    assert report.usage == Usage()


def test_document_is_found_among_other_lines() -> None:
    output = f"{{not json\nlog\n{MINI}\nbye\n"
    assert parse_usage("mini-json", output).usage.cost_usd == 0.5


def test_unknown_format_is_an_error() -> None:
    with pytest.raises(KeyError):
        parse_usage("nothing", "")


def test_only_plausible_numbers_are_counts_or_costs() -> None:
    assert [as_count(value) for value in (3, 3.0, 0)] == [3, 3, 0]
    wrong: list[object] = [True, -1, 1.5, "3", None, 10**13, float("nan"), float("inf")]
    assert [as_count(value) for value in wrong] == [None] * 8
    assert [as_cost(value) for value in (0, 0.5)] == [0.0, 0.5]
    bad: list[object] = [True, -0.1, "1", None, 1e9, float("nan"), float("inf"), 10**400]
    assert [as_cost(value) for value in bad] == [None] * 8
