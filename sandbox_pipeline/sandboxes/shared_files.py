"""What is the same inside all isolated sandboxes: made once, and shown to each in one mount.

For each mount, bubblewrap reads the list of all mounts anew: the dozen of /etc alone was a third of
a sandbox's start.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from sandbox_pipeline.sandboxes.base import HOME
from sandbox_pipeline.sandboxes.trees import remove_tree

# Never all of /etc/ssl or /etc/pki: their folders `private` hold the host's own keys, which the
# sandbox of a root user could read.
COPIED_ETC = (
    *("ssl/certs", "ssl/openssl.cnf", "pki/ca-trust", "pki/tls/certs", "pki/tls/cert.pem"),
    *("ca-certificates", "ca-certificates.conf", "alternatives", "ld.so.cache", "localtime"),
    *("nsswitch.conf", "os-release"),
)
MADE_ETC: Mapping[str, str] = {
    "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:1000:1000:user:{HOME}:/bin/sh\n",
    "group": "root:x:0:\nuser:x:1000:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
}
SHARED = "shared"
UNUSED_SECONDS = 30 * 86_400.0
"""After which a folder that no process has taken is removed; no sandbox lives so long."""


def shared_folder(root: Path, shim: bytes, etc: Path = Path("/etc")) -> Path:
    """The folder `shim` and `etc` are in; made where it is missing.

    Args:
        root: of all sandboxes; the folders, one for each content, are in its folder `SHARED`.
        shim: the program inside.
        etc: the host's.

    Raises:
        OSError: it can't be written.
    """
    place = root / SHARED / _digest(shim, etc)
    if not place.is_dir():
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_unused(place.parent)
        made = place.with_name(f".new-{secrets.token_hex(8)}")
        _fill(made, shim, etc)
        try:
            made.rename(place)
        except OSError:
            # Another process was first.
            remove_tree(str(made))
    _mark_used(place)
    return place


def etc_names(folder: Path) -> list[str]:
    """What a folder that was made has for /etc."""
    return sorted(path.name for path in (folder / "etc").iterdir())


@functools.cache
def _digest(shim: bytes, etc: Path) -> str:
    """Changes with all that is copied."""
    known = hashlib.sha256(shim)
    known.update(repr(sorted(MADE_ETC.items())).encode())
    for name in COPIED_ETC:
        for path in _sources(etc / name):
            found = path.stat()
            known.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return known.hexdigest()[:32]


def _sources(path: Path) -> Iterator[Path]:
    """A path that leads somewhere; folders and files below it.

    Without links, of which there are hundreds: who changes one changes its folder's time.
    """
    if not path.exists():
        return
    yield path
    with contextlib.suppress(NotADirectoryError, PermissionError):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if not entry.is_symlink():
                yield from _sources(Path(entry.path))


def _fill(made: Path, shim: bytes, etc: Path) -> None:
    (made / "etc").mkdir(mode=0o755, parents=True)
    (made / "shim").write_bytes(shim)
    for name, text in MADE_ETC.items():
        (made / "etc" / name).write_text(text, encoding="ascii")
    for name in COPIED_ETC:
        source, target = etc / name, made / "etc" / name
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        # What this user may not read would be unreadable inside as well.
        with contextlib.suppress(OSError, shutil.Error):
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copyfile(source, target)


@functools.cache
def _mark_used(place: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(place)


def _remove_unused(folder: Path) -> None:
    for place in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - place.stat().st_mtime > UNUSED_SECONDS:
                remove_tree(str(place))
