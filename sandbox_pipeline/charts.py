"""Small charts as SVG text: where the time of each fork went, and what it cost."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from sandbox_pipeline.records import Fork, Orchestration, Verdict

PHASES = ("queue", "create", "health", "agent", "cleanup", "verify")
PHASE_COLORS = {
    "queue": "#b8bcc4",
    "create": "#5b8ff9",
    "health": "#36b5a2",
    "agent": "#8b6cd9",
    "cleanup": "#d9a441",
    "verify": "#3c8c4a",
}
VERDICT_COLORS = {
    Verdict.VERIFIED: "#3c8c4a",
    Verdict.REJECTED: "#c2483d",
    Verdict.UNVERIFIED: "#8a909c",
    Verdict.ERROR: "#d9a441",
}
MAX_IMAGE_ROWS = 60
_ROW = 18
_LEFT = 64
_WIDTH = 720
_TOP = 30
_INK = "#6b7280"


@dataclass(frozen=True)
class Segment:
    """One phase of one fork.

    Attributes:
        start_seconds: since the orchestration was asked for.
    """

    phase: str
    start_seconds: float
    seconds: float


def segments(orchestration: Orchestration, fork: Fork) -> list[Segment]:
    """The phases of a fork in order; a phase that never began is left out."""
    begin = fork.queued_at or fork.started_at
    if begin is None:
        return []
    at = max(0.0, begin.seconds_since(orchestration.requested_at))
    times = fork.timings
    lengths = {
        "queue": times.queue_seconds,
        "create": times.create_seconds,
        "health": times.health_seconds,
        "agent": times.agent_seconds,
        "cleanup": times.cleanup_seconds,
        "verify": fork.verification.seconds if fork.verification else None,
    }
    found: list[Segment] = []
    for phase in PHASES:
        seconds = lengths[phase]
        if seconds:
            found.append(Segment(phase, at, seconds))
            at += seconds
    return found


def timeline_svg(orchestration: Orchestration, forks: Sequence[Fork]) -> str:
    """A row a fork, a colour a phase, with its own legend and scale."""
    shown = list(forks)[:MAX_IMAGE_ROWS]
    rows = [(fork, segments(orchestration, fork)) for fork in shown]
    end = max((s.start_seconds + s.seconds for _, found in rows for s in found), default=1.0)
    scale = (_WIDTH - _LEFT - 60) / max(end, 1e-6)
    parts: list[str] = []
    for number, phase in enumerate(PHASES):
        x = _LEFT + number * 88
        parts.append(_rect(x, 8, 10, 10, PHASE_COLORS[phase]))
        parts.append(_text(x + 14, 17, phase))
    for number, (fork, found) in enumerate(rows):
        y = _TOP + number * _ROW
        parts.append(_text(4, y + 11, f"fork {fork.fork_num}"))
        for item in found:
            x = _LEFT + item.start_seconds * scale
            width = max(1.0, item.seconds * scale)
            parts.append(_rect(x, y, width, _ROW - 6, PHASE_COLORS[item.phase], item.phase))
    height = _TOP + len(rows) * _ROW + 22
    parts.append(_text(_LEFT, height - 6, "0 s"))
    parts.append(_text(_WIDTH - 60, height - 6, f"{end:.1f} s"))
    return _svg(height, parts)


def cost_svg(forks: Sequence[Fork]) -> str:
    """A bar a fork, as long as its cost and in the colour of its verdict."""
    shown = list(forks)[:MAX_IMAGE_ROWS]
    costs = [fork.result.usage.cost_usd if fork.result else None for fork in shown]
    most = max((cost for cost in costs if cost is not None), default=0.0)
    parts: list[str] = []
    for number, verdict in enumerate(Verdict):
        x = _LEFT + number * 100
        parts.append(_rect(x, 8, 10, 10, VERDICT_COLORS[verdict]))
        parts.append(_text(x + 14, 17, verdict.value))
    for number, (fork, cost) in enumerate(zip(shown, costs, strict=True)):
        y = _TOP + number * _ROW
        verdict = fork.verification.outcome if fork.verification else Verdict.UNVERIFIED
        width = max(3.0, (cost or 0.0) / most * (_WIDTH - _LEFT - 90)) if most else 3.0
        parts.append(_text(4, y + 11, f"fork {fork.fork_num}"))
        parts.append(_rect(_LEFT, y, width, _ROW - 6, VERDICT_COLORS[verdict], verdict.value))
        label = "cost unknown" if cost is None else f"${cost:.4f}"
        parts.append(_text(_LEFT + width + 6, y + 11, label))
    return _svg(_TOP + len(shown) * _ROW + 6, parts)


def data_url(svg: str) -> str:
    """The image as a URL that needs no request."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" font-size="11">'
        + "".join(parts)
        + "</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, color: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{color}">{inner}</rect>'
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{_INK}">{escape(text)}</text>'
