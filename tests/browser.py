"""A real browser for tests: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--force-color-profile=srgb",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def launched() -> Iterator[Browser]:
    """One browser; the test is skipped, and says so, where there is none."""
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=ARGUMENTS
        )
        try:
            yield browser
        finally:
            browser.close()


def settle(page: Page) -> None:
    """Wait until Dagster's page shows what it loaded in place of grey bars."""
    page.wait_for_timeout(500)  # the bars come with the page's first questions
    bars = page.locator("[class*=Skeleton_skeleton]:visible, [class*=-skeleton]:visible")
    expect(bars).to_have_count(0, timeout=30_000)


def widen_above(page: Page, pixels: int) -> None:
    """Drag the line between the upper and the lower part of a page down."""
    found = page.evaluate(
        """() => { for (const one of document.querySelectorAll("div")) {
            const box = one.getBoundingClientRect(), cursor = getComputedStyle(one).cursor;
            if (["ns-resize", "row-resize"].includes(cursor) && box.width > 300)
                return [box.x + box.width / 2, box.y + box.height / 2];
        } return null; }"""
    )
    assert found is not None, "the page has no line to drag"
    x, y = found
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + pixels, steps=10)
    page.mouse.up()


def keep(page: Page, name: str, *, full_page: bool = False) -> None:
    """Take a screenshot for README and docs; only where it was asked for."""
    if os.environ.get("KEEP_SCREENSHOTS"):
        IMAGES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=IMAGES / f"{name}.png", full_page=full_page)
