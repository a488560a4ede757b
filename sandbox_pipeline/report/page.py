"""The page: a template filled with escaped text, and data that its script shows on demand.

Nothing that an agent made reaches the page unescaped: the template escapes, the data blocks can't
be left (`_block`), the script uses `textContent`, and the page's own policy lets no other script
run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sandbox_pipeline.charts import PHASE_COLORS, PHASES, VERDICT_COLORS, segments
from sandbox_pipeline.metrics import summary_row, verdict_of
from sandbox_pipeline.ranking import Place, Ranking
from sandbox_pipeline.records import Fork, Orchestration
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.report.details import details
from sandbox_pipeline.results import fork_of, ranking_of, read_patch
from sandbox_pipeline.tournament import decided

REPORT_FILE = "report.html"
MAX_WINNER_BYTES = 200_000
MAX_PROMPT_CHARS = 50_000
_FOLDER = Path(__file__).parent

# They change how text is read without being seen.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def write_report(orchestration: Orchestration, forks: Sequence[Fork], redactor: Redactor) -> Path:
    """Write the page into the artifacts folder; replaces an earlier one at once."""
    path = Path(orchestration.artifacts) / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(redactor.clean(render(orchestration, forks).encode())[0])
    partial.replace(path)
    return path


def render(orchestration: Orchestration, forks: Sequence[Fork]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("sandbox_pipeline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
    )
    ranked = ranking_of(orchestration, forks)
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    return environment.get_template("template.html.j2").render(
        style=Markup(style),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704 - our own file
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=metadata.version("sandbox-pipeline"),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        details=details(forks),
        **_head(orchestration, forks, ranked),
        **_winner(orchestration, forks, ranked),
        **_rows(orchestration, forks, ranked),
    )


def _head(orchestration: Orchestration, forks: Sequence[Fork], ranked: Ranking) -> dict[str, Any]:
    config = orchestration.config
    summary = summary_row(orchestration, forks)
    prompt = config.prompt
    if len(prompt) > MAX_PROMPT_CHARS:
        prompt = f"{prompt[:MAX_PROMPT_CHARS]}… ({len(prompt)} characters)"
    wall = summary["wall_seconds"]
    cost = summary["cost_usd"]
    tiles = [
        ("forks", config.num_forks),
        ("succeeded", summary["succeeded"]),
        ("verified", summary["verified"] if config.verify_command else "not checked"),
        ("cost", "unknown" if cost is None else f"${cost:.2f}"),
        ("wall time", "running" if wall is None else f"{wall:.1f} s"),
        ("sandboxes", f"{summary['sandbox_seconds']:.1f} s"),
    ]
    data = config.model_dump(mode="json", exclude_defaults=True)
    return {
        "workflow_id": orchestration.workflow_id,
        "num_forks": config.num_forks,
        "repo": config.repo_url,
        "branch": orchestration.branch or "",
        "commit": (orchestration.base_commit or "")[:12],
        "commit_full": orchestration.base_commit or "unknown",
        "agent": config.agent.kind,
        "model": config.model,
        "provider": orchestration.provider,
        "requested": orchestration.requested_at.at.strftime("%Y-%m-%d %H:%M UTC"),
        "prompt": prompt,
        "tiles": tiles,
        "headline": ranked.headline,
        "judge": ranked.judge,
        "comparisons": _comparisons(orchestration),
        "configuration": _highlighted(
            yaml.safe_dump(data, sort_keys=False, allow_unicode=True), "yaml", "Configuration"
        ),
        "artifacts": orchestration.artifacts,
    }


def _comparisons(orchestration: Orchestration) -> list[dict[str, Any]]:
    judging = orchestration.judging
    return [
        {
            "one": item.one,
            "other": item.other,
            "better": "tie" if item.winner is None else f"fork {item.winner}",
            "reason": item.reason,
        }
        for item in (decided(judging) if judging is not None else [])
    ]


def _winner(orchestration: Orchestration, forks: Sequence[Fork], ranked: Ranking) -> dict[str, Any]:
    name = orchestration.workflow_id
    if ranked.winner is None:
        return {
            "winner": None, "winner_diff": None, "winner_note": "",
            "take": f"sandbox-pipeline patch FORK --workflow {name}",
        }  # fmt: skip
    number = ranked.winner.fork_num
    patch = read_patch(fork_of(forks, number))
    note = ""
    if len(patch) > MAX_WINNER_BYTES:
        note = f"The first {MAX_WINNER_BYTES} of {len(patch)} bytes."
    text = patch[:MAX_WINNER_BYTES].decode("utf-8", "replace")
    return {
        "winner": str(number),
        "winner_diff": _highlighted(text, "diff", "The winner's change"),
        "winner_note": note,
        "take": f"sandbox-pipeline apply {number} --workflow {name}",
    }


def _rows(orchestration: Orchestration, forks: Sequence[Fork], ranked: Ranking) -> dict[str, Any]:
    by_number = {fork.fork_num: fork for fork in forks}
    order = [place.fork_num for place in ranked.places]
    lines = {fork.fork_num: segments(orchestration, fork) for fork in forks}
    end = max((s.start_seconds + s.seconds for found in lines.values() for s in found), default=1)
    known = [_cost(fork) or 0.0 for fork in forks]
    most = max(known, default=0.0) or 1.0
    second = order[1] if len(order) > 1 else order[0]
    return {
        "ranking": [_place(place, by_number[place.fork_num]) for place in ranked.places],
        "options": [
            {"fork": n, "text": f"{n}: {verdict_of(by_number[n])}, {by_number[n].outcome}"}
            for n in order
        ],
        "pickers": [("left", "Left", order[0]), ("right", "Right", second)],
        "phases": list(PHASE_COLORS.items()),
        "end_seconds": f"{end:.1f}",
        "timeline": [
            {
                "fork": fork.fork_num,
                "label": ", ".join(
                    f"{s.phase} {s.seconds:.2f} s" for s in lines[fork.fork_num]
                ) or "never started",
                "segments": [
                    {
                        "x": f"{s.start_seconds / end * 1000:.2f}",
                        "width": f"{max(1.0, s.seconds / end * 1000):.2f}",
                        "color": PHASE_COLORS[s.phase],
                    }
                    for s in lines[fork.fork_num]
                    if s.phase in PHASES
                ],
                "total": _seconds(fork.total_seconds),
            }
            for fork in forks
        ],
        "costs": [_cost_row(fork, most) for fork in forks],
    }  # fmt: skip


def _place(place: Place, fork: Fork) -> dict[str, Any]:
    patch = fork.patch
    return {
        "place": place.place,
        "fork": place.fork_num,
        "verdict": place.candidate.verdict.value,
        "outcome": place.candidate.outcome.value,
        "reason": place.reason,
        "change": f"+{patch.insertions} −{patch.deletions}" if patch else "",  # noqa: RUF001 - a minus sign
        "cost": _dollars(_cost(fork)),
        "seconds": _seconds(fork.timings.agent_seconds),
    }


def _cost_row(fork: Fork, most: float) -> dict[str, Any]:
    usage = fork.result.usage if fork.result else None
    return {
        "fork": fork.fork_num,
        "cost": _dollars(_cost(fork)),
        "width": f"{(_cost(fork) or 0.0) / most * 1000:.2f}",
        "color": VERDICT_COLORS[verdict_of(fork)],
        "input": _count(usage and usage.input_tokens),
        "written": _count(usage and usage.cache_creation_input_tokens),
        "read": _count(usage and usage.cache_read_input_tokens),
        "output": _count(usage and usage.output_tokens),
        "turns": _count(fork.result.turns if fork.result else None),
    }


def _cost(fork: Fork) -> float | None:
    return fork.result.usage.cost_usd if fork.result else None


def _dollars(value: float | None) -> str:
    return "unknown" if value is None else f"${value:.4f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _highlighted(text: str, language: str, label: str) -> Markup:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name  # pyright: ignore[reportUnknownVariableType]

    lexer = cast("Any", get_lexer_by_name)(language, stripnl=False)
    formatter = cast("Any", HtmlFormatter)(nowrap=True)
    inner = str(cast("Any", highlight)(str(_visible(text)), lexer, formatter))
    opened = f'<pre class="highlight" tabindex="0" role="region" aria-label="{label}">'
    return Markup(f"{opened}{inner}</pre>")  # noqa: S704 - pygments escapes what it highlights


def _visible(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNSEEN.sub("\ufffd", value)
    return value


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
