"""What an orchestration leaves behind and needs meanwhile: rows, bytes, memory, connections.

Usage: python -m benchmarks.footprint [--forks 20] [--json]

Runs no-op forks (a real run of the job, a bubblewrap sandbox each) with the store and Dagster's own
storage in a PostgreSQL of its own, or in SQLite files where PostgreSQL is not installed, once with
one fork and once with all, so that what a fork adds is apart from what a run costs anyhow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import sqlalchemy as sa

from benchmarks.measuring import job_argv
from tests.conftest import make_repo
from tests.postgres import find_programs, running_postgres

WIDTH = 10
SAMPLE_SECONDS = 0.2
DAGSTER_YAML = """\
telemetry:
  enabled: false
python_logs:
  python_log_level: INFO
"""


@dataclass
class Footprint:
    """What one orchestration left.

    Attributes:
        rows: by table, the store's and Dagster's.
        bytes: by table, indexes included (PostgreSQL), or by file.
        artifact_bytes: patches, transcripts, logs and the pinned commit.
        peak_memory_mb: of the run's process tree without the sandboxes' own.
        connections: most at once to both databases; None: SQLite.
    """

    forks: int
    rows: dict[str, int] = field(default_factory=dict[str, int])
    bytes: dict[str, int] = field(default_factory=dict[str, int])
    artifact_bytes: int = 0
    peak_memory_mb: float = 0.0
    connections: int | None = None


@dataclass(frozen=True)
class Databases:
    """SQLAlchemy URLs; None: files of SQLite in the home folder."""

    store: str | None
    dagster: str | None


@contextlib.contextmanager
def databases() -> Generator[Databases]:
    """New and empty ones, until the block ends."""
    if find_programs() is None:
        sys.stderr.write("no PostgreSQL here: measuring with SQLite\n")
        yield Databases(None, None)
        return
    with running_postgres() as server:
        yield Databases(
            server.new_database(), server.new_database().replace("+psycopg", "+psycopg2")
        )


def measure(forks: int) -> Footprint:
    """Run an orchestration and look at what it left."""
    with databases() as used, tempfile.TemporaryDirectory(prefix="footprint-") as folder:
        home = Path(folder) / "home"
        home.mkdir()
        text = DAGSTER_YAML
        if used.dagster is not None:
            text += f"storage:\n  postgres:\n    postgres_url: {used.dagster}\n"
        (home / "dagster.yaml").write_text(text, encoding="utf-8")
        environ = {**os.environ, "DAGSTER_HOME": str(home)}
        if used.store is not None:
            environ["SANDBOX_PIPELINE_DB_URL"] = used.store
        repo = make_repo(Path(folder) / "repo")
        process = subprocess.Popen(
            job_argv(repo, forks, WIDTH), env=environ, stdout=subprocess.DEVNULL
        )
        found = Footprint(forks)
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(found, process.pid, used, over))
        watcher.start()
        code = process.wait()
        over.set()
        watcher.join()
        if code != 0:
            msg = f"the run of {forks} forks failed with {code}"
            raise SystemExit(msg)
        urls = [used.store, used.dagster]
        if used.store is None:
            urls = [f"sqlite:///{home}/sandbox_pipeline.db"]
            urls += [f"sqlite:///{path}" for path in (home / "history").rglob("*.db")]
        for url in urls:
            _count(found, url or "")
        found.artifact_bytes = _size(home / "artifacts")
        return found


def _watch(found: Footprint, pid: int, used: Databases, over: threading.Event) -> None:
    engine = sa.create_engine(used.store) if used.store is not None else None
    while not over.wait(SAMPLE_SECONDS):
        with contextlib.suppress(psutil.Error):
            memory = psutil.Process(pid).memory_full_info().pss / 1e6
            found.peak_memory_mb = max(found.peak_memory_mb, memory)
        if engine is not None:
            with engine.connect() as connection:
                query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'tests'"
                count = int(connection.execute(sa.text(query)).scalar_one()) - 1
            found.connections = max(found.connections or 0, count)
    if engine is not None:
        engine.dispose()


def _count(found: Footprint, url: str) -> None:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        for table in sa.inspect(engine).get_table_names():
            query = sa.select(sa.func.count()).select_from(sa.table(table))
            rows = int(connection.execute(query).scalar_one())
            found.rows[table] = found.rows.get(table, 0) + rows
            if engine.dialect.name == "postgresql":
                size = connection.execute(sa.select(sa.func.pg_total_relation_size(table)))
                found.bytes[table] = int(size.scalar_one())
    if engine.dialect.name == "sqlite":
        path = Path(engine.url.database or "")
        found.bytes[path.name] = path.stat().st_size
    engine.dispose()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Measure with one fork and with many, and print what a fork adds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    one, many = measure(1), measure(chosen.forks)
    if chosen.json:
        print(json.dumps([asdict(one), asdict(many)]))
        return 0
    more = many.forks - one.forks
    print(f"| | 1 fork | {many.forks} forks | a fork adds |\n|---|---|---|---|")
    for table, rows in sorted(many.rows.items()):
        before = one.rows.get(table, 0)
        if rows != before or rows > 1:
            print(f"| rows of `{table}` | {before} | {rows} | {(rows - before) / more:.1f} |")
    for table, size in sorted(many.bytes.items()):
        before = one.bytes.get(table, 0)
        if size > before:
            added = (size - before) / more / 1000
            print(f"| kB of `{table}` | {before / 1000:.0f} | {size / 1000:.0f} | {added:.1f} |")
    before, after = one.artifact_bytes / 1000, many.artifact_bytes / 1000
    print(f"| kB of artifacts | {before:.0f} | {after:.0f} | {(after - before) / more:.1f} |")
    print(
        f"| most memory of the run, MB | {one.peak_memory_mb:.0f} | {many.peak_memory_mb:.0f} "
        f"| {(many.peak_memory_mb - one.peak_memory_mb) / more:.2f} |"
    )
    if many.connections is not None:
        print(f"| most connections | {one.connections} | {many.connections} | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
