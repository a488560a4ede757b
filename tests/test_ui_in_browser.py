"""Dagster's UI as a person uses it, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from sandbox_pipeline import demo
from sandbox_pipeline.launching import launch
from tests.browser import keep, launched, settle, widen_above
from tests.webserver import Webserver, deployed_webserver

NIGHTLY = """\
cron: "0 3 * * *"
repo_url: demo
prompt: p
num_forks: 1
agent:
  command: python3 agent.py {prompt_file} 0
"""
# Octal, since braces are the template's.
TELLS_ITS_COST = (
    "sh -c 'python3 agent.py {prompt_file} {fork_num}; code=$?; "
    r'printf "\\173\"type\":\"step_finish\",\"part\":\\173\"cost\":%.3f\\175\\175\\n"; '
    "exit $code'"
)
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webserver]:
    folder = tmp_path_factory.mktemp("ui")
    if os.environ.get("KEEP_SCREENSHOTS"):
        # Paths are in the pictures.
        folder = Path(tempfile.gettempdir()) / "sandbox-pipeline"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    with deployed_webserver(folder, {"nightly.yaml": NIGHTLY}) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Page:
    context = browser.new_context(viewport={"width": 1360, "height": 1000})
    context.set_default_timeout(WAIT_MS)
    return context.new_page()


def test_from_the_launchpad_to_the_winner(page: Page, server: Webserver) -> None:
    page.goto(f"{server.url}/locations/sandbox_pipeline/jobs/orchestration_job/playground")
    editor = page.locator(".CodeMirror").first
    expect(editor).to_contain_text(demo.PROMPT, timeout=WAIT_MS)
    expect(page.get_by_text("No errors")).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("body")).to_contain_text("Configure runtime parameters")
    keep(page, "launchpad")
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url(re.compile("/runs/[0-9a-f-]{36}"))
    run_id = page.url.rsplit("/", 1)[1].split("?")[0]
    expect(page.locator("body")).to_contain_text("run_agent", timeout=WAIT_MS)
    assert server.wait_for_status(run_id, "SUCCESS", "FAILURE") == "SUCCESS"
    page.reload()
    expect(page.locator("body")).to_contain_text("RUN_SUCCESS", timeout=WAIT_MS)
    settle(page)
    widen_above(page, 260)  # else Dagster's search box lies over the Gantt chart
    page.wait_for_timeout(1500)  # which moves into place
    keep(page, "run")

    page.goto(f"{server.url}/assets/fork_metrics?view=checks")
    for name in ("every_planned_fork_present", "no_sandbox_leaked", "success_rate",
                 "verification_untampered"):  # fmt: skip
        expect(page.get_by_text(name).first).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_text("Passed").first).to_be_visible()
    settle(page)
    keep(page, "checks")

    page.goto(f"{server.url}/assets/fork_metrics")
    expect(page.locator("body")).to_contain_text("all tests pass", timeout=WAIT_MS)

    page.goto(f"{server.url}/assets/ranking")
    expect(page.locator("body")).to_contain_text("fork 0 wins: verified", timeout=WAIT_MS)
    settle(page)
    keep(page, "ranking")
    for number, name in enumerate(("phases", "cost")):
        page.get_by_text("[Show Markdown]").nth(number).click()
        image = page.locator(f"img[alt={name}]")
        expect(image).to_be_visible(timeout=WAIT_MS)
        assert image.evaluate("one => one.naturalWidth") > 0, "the chart is really drawn"
        page.wait_for_timeout(500)  # the dialog moves into place
        keep(page, f"ranking-{name}")
        page.get_by_role("button", name="Close").click()
        expect(image).to_have_count(0)

    page.goto(f"{server.url}/assets/winner")
    expect(page.locator("body")).to_contain_text("re.findall", timeout=WAIT_MS)
    settle(page)
    keep(page, "winner")


@pytest.mark.timeout(900)  # some more runs, where pictures are taken
def test_each_model_has_its_plots(page: Page, server: Webserver) -> None:
    runs = [("sonnet", 2), ("opus", 1)]
    if os.environ.get("KEEP_SCREENSHOTS"):
        runs += [("opus", 2), ("sonnet", 1), ("opus", 3), ("opus", 1), ("sonnet", 2)]
    for number, (model, forks) in enumerate(runs):
        config = {**demo.CONFIG, "model": model, "num_forks": forks}
        cost = {"sonnet": 0.21, "opus": 0.34}[model] + 0.013 * number
        config["agent"] = {"command": TELLS_ITS_COST % cost, "usage_format": "opencode-jsonl"}
        run_id = launch(config, url=server.url)
        assert server.wait_for_status(run_id, "SUCCESS", "FAILURE") == "SUCCESS"
    page.goto(f"{server.url}/assets/trends")
    page.get_by_text("Plots", exact=True).first.click()
    for model in ("opus", "sonnet"):
        for name in ("verified_rate", "cost_per_verified_usd", "agent_seconds_p50"):
            title = page.get_by_text(f"{name}: {model} on demo", exact=True)
            expect(title).to_be_visible(timeout=WAIT_MS)
    settle(page)
    page.get_by_text("Metadata", exact=True).first.evaluate("one => one.scrollIntoView()")
    page.wait_for_timeout(1000)  # the plots are drawn
    keep(page, "trends")


def test_a_schedule_is_turned_on(page: Page, server: Webserver) -> None:
    page.goto(f"{server.url}/automation")
    row = page.get_by_text("nightly_schedule").first
    expect(row).to_be_visible(timeout=WAIT_MS)
    switch = page.get_by_role("switch").or_(page.locator("input[type=checkbox]")).first
    switch.wait_for(state="attached")
    page.goto(f"{server.url}/locations/sandbox_pipeline/schedules/nightly_schedule")
    toggle = page.locator("label:has(input[type=checkbox])").first
    toggle.wait_for()
    toggle.click()
    query = """{ schedulesOrError(repositorySelector: {repositoryName: "__repository__",
        repositoryLocationName: "sandbox_pipeline"}) { ... on Schedules { results { name
        scheduleState { status } } } } }"""
    status = ""
    for _ in range(50):
        [schedule] = server.graphql(query)["schedulesOrError"]["results"]
        status = schedule["scheduleState"]["status"]
        if status == "RUNNING":
            break
        page.wait_for_timeout(200)
    assert status == "RUNNING"
    keep(page, "schedule")
