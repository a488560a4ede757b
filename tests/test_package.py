"""The wheel works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True
    )
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(ours, encoding="utf-8")
    return folder / "venv" / "bin" / "python"


def test_the_installed_package_is_complete(installed: Path, tmp_path: Path) -> None:
    script = (
        "import sandbox_pipeline, pathlib; from sandbox_pipeline import demo; "
        "from sandbox_pipeline.store import Store; from sandbox_pipeline.instance import TEMPLATE; "
        "root = pathlib.Path(sandbox_pipeline.__file__).parent; "
        "assert 'site-packages' in str(root), root; assert (root / 'py.typed').exists(); "
        "assert TEMPLATE.exists(); Store.open('sqlite:///s.db'); "
        "print(demo.make_repository(pathlib.Path('.')))"
    )
    done = subprocess.run(
        [str(installed), "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo-repository" / "agent.py").exists()


def test_the_installed_command_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(installed), "-m", "sandbox_pipeline", "demo"],
        cwd=tmp_path,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_does_not_import_dagster() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sandbox_pipeline", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = [name for name in ("dagster", "pandas", "sqlalchemy", "e2b", "anthropic")
             if f"| {name}\n" in done.stderr]  # fmt: skip
    assert heavy == []
