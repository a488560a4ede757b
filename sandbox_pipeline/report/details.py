"""What the page shows of a fork on demand, within a budget for the whole page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sandbox_pipeline.records import Fork
from sandbox_pipeline.results import read_patch

PAGE_BYTES = 7_000_000
MAX_FORK_BYTES = 600_000
PATCH_SHARE, TRANSCRIPT_SHARE, LOG_SHARE = 0.5, 0.35, 0.15
MAX_ENTRY_CHARS = 4000
MAX_REASON_BYTES = 4000
TRANSCRIPT_TAIL_BYTES = 2_000_000


def details(forks: Sequence[Fork]) -> Iterator[tuple[int, Markup]]:
    """Number and data block of each fork; all together within `PAGE_BYTES`."""
    each = min(MAX_FORK_BYTES, PAGE_BYTES // max(1, len(forks)))
    for fork in forks:
        yield fork.fork_num, _block(_data(fork, each))


def _data(fork: Fork, budget: int) -> dict[str, Any]:
    raw = read_patch(fork)
    patch, cut = _clipped(raw.decode("utf-8", "replace"), int(budget * PATCH_SHARE))
    data: dict[str, Any] = {"patch": patch}
    if cut:
        data["patch_note"] = (
            f"only the beginning of the patch is shown; all of it: {fork.patch and fork.patch.path}"
        )
    if fork.verification is not None:
        found = fork.verification
        said = f"{found.outcome.value}: {found.reason}"
        if found.restored:
            said += f". Put back: {', '.join(found.restored)}"
        data["verification"] = _clipped(said, min(MAX_REASON_BYTES, budget // 4))[0]
        log = _tail(found.log_path, int(budget * LOG_SHARE))
        data["log"] = _clipped(log, int(budget * LOG_SHARE), keep_end=True)[0]
    folder = Path(fork.patch.path).parent if fork.patch and fork.patch.path else None
    if folder is not None:
        entries, left_out = _transcript(folder / "transcript.jsonl", int(budget * TRANSCRIPT_SHARE))
        data["transcript"] = entries
        if left_out:
            data["transcript_note"] = f"Earlier entries are in {folder / 'transcript.jsonl'}"
    return data


def _transcript(path: Path, budget: int) -> tuple[list[list[Any]], bool]:
    """The last entries that fit, and whether there are earlier ones."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TRANSCRIPT_TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return [], False
    left_out = size > TRANSCRIPT_TAIL_BYTES
    chosen: list[list[Any]] = []
    used = 0
    for line in reversed(lines[1 if left_out else 0 :]):
        entry = _entry(line)
        if entry is None:
            continue
        used += len(_dumped(entry))
        if used > budget:
            return chosen[::-1], True
        chosen.append(entry)
    return chosen[::-1], left_out


def _entry(line: bytes) -> list[Any] | None:
    """Type, name, text, whether it is an error; None for a line cut short."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    text = str(found.get("text") or "")
    if not text and found.get("input"):
        text = json.dumps(found["input"], ensure_ascii=False)
    if len(text) > MAX_ENTRY_CHARS:
        text = f"{text[:MAX_ENTRY_CHARS]}… ({len(text)} characters)"
    return [str(found.get("type")), found.get("name"), text, bool(found.get("is_error"))]


def _tail(path: str | None, budget: int) -> str:
    if path is None:
        return ""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - budget))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _clipped(text: str, budget: int, *, keep_end: bool = False) -> tuple[str, bool]:
    """As much of the text as takes at most `budget` bytes in the page."""
    cut = False
    text = text[-budget:] if keep_end and len(text) > budget else text[: max(budget, 0)]
    while text and (size := len(_dumped(text))) > budget + 100:
        cut = True
        keep = int(len(text) * budget / size * 0.95)
        text = text[-keep:] if keep_end and keep else text[:keep]
    return text, cut or len(text) == budget


def _block(data: dict[str, Any]) -> Markup:
    return Markup(_dumped(data).decode())  # noqa: S704 - `_dumped` leaves nothing to escape


def _dumped(data: Any) -> bytes:
    """JSON that can't end the element it stands in, nor begin another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode("utf-8", "replace")
