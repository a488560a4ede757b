"""The report: self-contained, small, and nothing an agent wrote gets executed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sandbox_pipeline.defs.decision import fenced
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.report import render, write_report
from sandbox_pipeline.report.details import _clipped, _dumped
from tests.reports import fork, orchestration, sample_patch

EVIL = (
    "<script>alert(1)</script></script><!--<script>]]>'\"><img src=x onerror=alert(2)>"
    "{{7*7}}${7*7}\u2028\u202etxt\x00\x1b[31m`</pre></textarea>"
)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def parsed(html: str) -> list[tuple[str, dict[str, str | None]]]:
    page = _Page()
    page.feed(html)
    return page.tags


def test_nothing_an_agent_wrote_becomes_markup(tmp_path: Path) -> None:
    plain_forks = [fork(tmp_path / "a", n) for n in range(3)]
    evil_patch = sample_patch(1).replace("shop/cart.py", f"shop/{EVIL}.py") + EVIL
    evil_forks = [fork(tmp_path / "b", n, patch=evil_patch, text=EVIL) for n in range(3)]
    plain = parsed(render(orchestration(tmp_path / "a", 3), plain_forks))
    html = render(
        orchestration(tmp_path / "b", 3, prompt=f"p {EVIL}".replace("\0", "")), evil_forks
    )
    evil = parsed(html)

    def kinds(tags: list[tuple[str, dict[str, str | None]]]) -> list[str]:
        # Highlighting makes spans, as many as there are lines.
        return [tag for tag, _ in tags if tag not in ("span", "rect", "p")]

    assert kinds(evil) == kinds(plain)
    assert not any(name.startswith("on") for _, attributes in evil for name in attributes)
    assert "alert(1)</script>" not in html
    assert "\u202e" not in html.split('<script type="application/json"')[0]
    scripts = [attributes for tag, attributes in evil if tag == "script"]
    assert [attributes.get("type") for attributes in scripts] == ["application/json"] * 3 + [None]
    data = json.loads(re.findall(r'id="fork-0">(.*?)</script>', html)[0])
    assert EVIL in data["patch"], "kept as it is, to be shown as text"


def test_it_asks_nobody_for_anything(tmp_path: Path) -> None:
    html = render(orchestration(tmp_path, 2), [fork(tmp_path, n) for n in range(2)])
    for tag, attributes in parsed(html):
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "action", "srcset", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith("#"), (tag, value)
        assert "style" not in attributes, "the policy would refuse it"
    policy = next(a for t, a in parsed(html) if t == "meta" and "http-equiv" in a)["content"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(("count", "megabytes"), [(1, 1), (100, 10), (1000, 12)])
def test_size_is_bounded_however_much_the_agents_wrote(
    tmp_path: Path, count: int, megabytes: int
) -> None:
    big = sample_patch(1, lines=20_000 if count <= 100 else 2000)
    forks = [fork(tmp_path, n, patch=big, text="<>&\n" * 5000) for n in range(count)]
    html = render(orchestration(tmp_path, count), forks)
    assert len(html.encode()) < megabytes * 1_000_000
    assert html.count('<script type="application/json"') == count


def test_a_secret_that_is_known_is_not_in_it(tmp_path: Path) -> None:
    secret = "canary-77aa88bb99"
    forks = [fork(tmp_path, 0, text=f"my key is {secret}")]
    path = write_report(orchestration(tmp_path, 1), forks, Redactor([secret]))
    text = path.read_text(encoding="utf-8")
    assert secret not in text
    assert "[redacted]" in text
    assert not list(path.parent.glob("*.partial"))


def test_forks_without_anything_have_their_rows(tmp_path: Path) -> None:
    from sandbox_pipeline.records import Fork, Outcome

    empty = [Fork(workflow_id="sample", fork_num=n, outcome=Outcome.CANCELLED) for n in range(2)]
    html = render(orchestration(tmp_path, 2), empty)
    assert "no winner: no fork left a patch" in html
    assert html.count("never started") == 2


def test_what_is_cut_fits_and_cannot_end_its_element() -> None:
    for text in ("a" * 5000, "<" * 5000, "é<" * 2000, ""):
        kept, cut = _clipped(text, 1000)
        assert len(_dumped(kept)) <= 1100
        assert cut == (len(text) > 1000 or len(_dumped(text)) > 1100)
    assert b"<" not in _dumped({"x": "</script>"})


def test_a_diff_cannot_leave_its_block_of_markdown() -> None:
    block = fenced("+```\n+# title\n+`````\n")
    assert block.startswith("``````diff\n")
    assert block.endswith("\n``````")
