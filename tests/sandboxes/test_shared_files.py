"""What all isolated sandboxes have in common is copied once, and anew when it changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sandbox_pipeline.sandboxes import shared_files
from sandbox_pipeline.sandboxes.shared_files import UNUSED_SECONDS, etc_names, shared_folder


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    made = tmp_path / "etc"
    (made / "ssl/certs").mkdir(parents=True)
    (made / "ssl/certs/bundle.crt").write_text("certificates")
    (made / "ssl/certs/one.pem").symlink_to("/usr/share/one.pem")
    (made / "ssl/private").mkdir()
    (made / "ssl/private/key").write_text("secret")
    (made / "passwd").write_text("the host's own")
    (made / "os-release").symlink_to(tmp_path / "release")
    (tmp_path / "release").write_text("some Linux")
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def as_another_process() -> None:
    shared_files._digest.cache_clear()
    shared_files._mark_used.cache_clear()


def test_it_has_what_is_named_and_nothing_else_of_the_host(root: Path, etc: Path) -> None:
    made = shared_folder(root, b"shim", etc)
    assert (made / "shim").read_bytes() == b"shim"
    assert etc_names(made) == ["group", "hosts", "os-release", "passwd", "ssl"]
    assert sorted(path.name for path in (made / "etc/ssl").rglob("*")) == [
        "bundle.crt",
        "certs",
        "one.pem",
    ]
    assert (made / "etc/ssl/certs/one.pem").readlink() == Path("/usr/share/one.pem")
    assert "host" not in (made / "etc/passwd").read_text()
    assert (made / "etc/os-release").read_text() == "some Linux"
    assert not (made / "etc/os-release").is_symlink()


def test_a_process_takes_what_another_made_unless_something_changed(root: Path, etc: Path) -> None:
    first = shared_folder(root, b"shim", etc)
    as_another_process()
    assert shared_folder(root, b"shim", etc) == first
    seen = {first, shared_folder(root, b"another shim", etc)}
    for change in (
        lambda: (etc / "ssl/certs/bundle.crt").write_text("others"),
        lambda: (etc / "ssl/certs/two.pem").symlink_to("/usr/share/two.pem"),
        lambda: (etc / "os-release").resolve().write_text("some other Linux"),
    ):
        change()
        as_another_process()
        seen.add(shared_folder(root, b"shim", etc))
    assert len(seen) == 5
    assert {path.name for path in (root / "shared").iterdir()} == {path.name for path in seen}


def test_only_what_no_process_has_taken_for_long_is_removed(root: Path, etc: Path) -> None:
    old = shared_folder(root, b"old", etc)
    used = shared_folder(root, b"used", etc)
    long_ago = time.time() - UNUSED_SECONDS - 60
    for place in (old, used):
        os.utime(place, (long_ago, long_ago))
    as_another_process()
    assert shared_folder(root, b"used", etc) == used
    made = shared_folder(root, b"new", etc)
    assert sorted((root / "shared").iterdir()) == sorted([used, made])


def test_it_is_made_again_where_somebody_removed_it(root: Path, etc: Path) -> None:
    made = shared_folder(root, b"shim", etc)
    made.rename(root / "elsewhere")
    assert shared_folder(root, b"shim", etc) == made
    assert (made / "shim").read_bytes() == b"shim"
