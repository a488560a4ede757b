"""The docs name only what exists, and generated parts are what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import dagster
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    named = re.findall(
        r"`((?:sandbox_pipeline|tests|docs|examples|benchmarks|deploy)/[\w./-]+\.\w+)`", text
    )
    for link in links:
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in named:
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_generated_parts_are_what_the_code_says() -> None:
    subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], check=True)


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: {target}"


def test_dagster_is_of_the_minor_version_that_the_executor_was_written_for() -> None:
    """A new minor may move what the executor touches: read it anew, then change this."""
    assert dagster.__version__.startswith("1.13.")


def test_workspace_and_project_file_name_the_same_location() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    workspace = (ROOT / "workspace.yaml").read_text(encoding="utf-8")
    assert project["dg"]["project"]["code_location_name"] == "sandbox_pipeline"
    assert project["dg"]["project"]["code_location_target_module"] in workspace
    assert "location_name: sandbox_pipeline" in workspace
