"""The report in a real browser: read, compared, on a phone, in the dark, by a screen reader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.report import write_report
from tests.browser import DESKTOP, PHONE, keep, launched
from tests.reports import fork, orchestration, sample_patch
from tests.test_report import EVIL

Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


def opened(
    browser: Browser, path: Path, size: dict[str, int] | None = None, scheme: Scheme = "light"
) -> tuple[Page, list[str]]:
    """The page, and what it complained of or asked others for."""
    viewport: Any = size or DESKTOP
    context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=False)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith("file:") else said.append(request.url),
    )
    page.goto(path.as_uri())
    return page, said


def made(folder: Path, count: int) -> Path:
    forks = [fork(folder, number) for number in range(count)]
    prompt = "The total of a cart is always 0. Make tests/test_cart.py pass."
    return write_report(orchestration(folder, count, prompt), forks, Redactor([]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_a_person_can_decide_with_it(
    browser: Browser, tmp_path: Path, size: str, scheme: Scheme
) -> None:
    page, said = opened(browser, made(tmp_path, 8), PHONE if size == "phone" else DESKTOP, scheme)
    assert "fork 0 wins: verified: 5 tests passed" in page.locator("p.decision").inner_text()
    keep(page, f"report-{size}-{scheme}")

    page.locator("#compare").scroll_into_view_if_needed()
    page.select_option("#left", "3")
    page.select_option("#right", "1")
    heads = page.locator("#comparison .head").all_inner_texts()
    assert heads == ["fork 3: shop/cart.py", "fork 1: shop/cart.py"]
    assert page.locator("#comparison .differs").count() > 0
    assert page.locator("#comparison .add").count() > 0
    keep(page, f"report-compare-{size}-{scheme}")

    page.locator("#read").scroll_into_view_if_needed()
    page.select_option("#reader", "1")
    assert "I changed shop/cart.py (1)." in page.locator("#transcript").inner_text()
    assert "rejected: 1 of 5 tests failed" in page.locator("#verification-reason").inner_text()
    assert "5 tests" in page.locator("#log").inner_text()

    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "the page itself never scrolls sideways"
    found = Axe().run(page)
    violations = cast("list[dict[str, Any]]", found.response["violations"])
    serious = [v for v in violations if v["impact"] in ("serious", "critical")]
    assert serious == [], found.generate_report()
    assert said == []


def test_what_an_agent_wrote_is_shown_and_never_executed(browser: Browser, tmp_path: Path) -> None:
    evil = sample_patch(1).replace("shop/cart.py", f"shop/{EVIL}.py") + EVIL
    forks = [fork(tmp_path, number, patch=evil, text=EVIL) for number in range(3)]
    path = write_report(orchestration(tmp_path, 3), forks, Redactor([]))
    page, said = opened(browser, path)
    for number in range(3):
        page.select_option("#left", str(number))
        page.select_option("#reader", str(number))
    page.wait_for_timeout(300)
    assert page.locator("img").count() == 0
    assert "<script>alert(1)</script>" in page.locator("#transcript").inner_text()
    assert "onerror=alert(2)" in page.locator("#comparison").inner_text()
    assert said == [], "no dialog, no error, no request, nothing that the policy had to refuse"


@pytest.mark.parametrize(("count", "seconds", "megabytes"), [(100, 2.0, 10), (1000, 10.0, 12)])
def test_many_forks_open_at_once(
    browser: Browser, tmp_path: Path, count: int, seconds: float, megabytes: int
) -> None:
    path = made(tmp_path, count)
    assert path.stat().st_size < megabytes * 1_000_000
    began = time.monotonic()
    page, said = opened(browser, path)
    page.locator("p.decision").wait_for()
    assert time.monotonic() - began < seconds
    page.select_option("#reader", str(count - 1))
    assert f"({count - 1})" in page.locator("#transcript").inner_text()
    page.select_option("#left", str(count - 1))
    page.locator("#comparison .head").first.wait_for()
    assert said == []
