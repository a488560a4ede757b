"""A PostgreSQL server of the tests' own, where its programs are installed."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import pytest

WHERE = "/usr/lib/postgresql/*/bin"
_numbers = itertools.count()


def find_programs() -> Path | None:
    """The folder with `initdb` and `postgres`; both are seldom on the PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/").glob(WHERE.lstrip("/")), reverse=True)
    return next((place for place in places if (place / "postgres").exists()), None)


class Postgres:
    """A running server; every database is a new one."""

    def __init__(self, port: int) -> None:
        self._port = port

    def new_database(self) -> str:
        """The SQLAlchemy URL of an empty database."""
        import psycopg

        name = f"t{next(_numbers)}"
        with psycopg.connect(self._at("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://tests@127.0.0.1:{self._port}/{name}"

    def _at(self, database: str) -> str:
        return f"host=127.0.0.1 port={self._port} user=tests dbname={database}"


@contextlib.contextmanager
def running_postgres() -> Generator[Postgres]:
    """A server until the block ends; skips the test where it is not installed."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL NOT TESTED: no initdb here; apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="tests-postgres-"))
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        process = _start(programs, folder, port)
        try:
            _wait_until_ready(port, folder)
            yield Postgres(port)
        finally:
            process.terminate()
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(programs: Path, folder: Path, port: int) -> subprocess.Popen[bytes]:
    user: str | None = None
    if os.geteuid() == 0:  # which PostgreSQL refuses
        user = "nobody"
        folder.chmod(0o755)
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
    data = folder / "data"
    made = subprocess.run(
        [programs / "initdb", "-D", data, "-U", "tests", "-A", "trust", "--no-sync", "-E", "UTF8"],
        user=user, cwd=folder, capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    options = ["-c", "fsync=off", "-c", f"unix_socket_directories={folder}", "-h", "127.0.0.1"]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        return subprocess.Popen(
            [programs / "postgres", "-D", data, "-p", str(port), *options],
            user=user, cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _wait_until_ready(port: int, folder: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user=tests dbname=postgres").close()
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                log = folder.parent / f"{folder.name}.log"
                raise AssertionError(log.read_text(encoding="utf-8")) from None
            time.sleep(0.05)
        else:
            return
