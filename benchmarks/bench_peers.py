"""The same work by this project and by what people would use instead, in one run.

Usage: python -m benchmarks.bench_peers [--forks 32] [--width 8] [--runs 5]

Each fork is a clone of a small repository, one shell command (`true`) in bubblewrap, and the patch.
The others do that and nothing else. This project also keeps leases, budgets, a durable store,
a timeline, a health check and a checked-out workspace that outlives its worker: compare
magnitudes. Needs `make .venv-peers/.installed`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.__main__ import machine
from benchmarks.measuring import Row, cpu_of_a_tree, run_job, table
from tests.conftest import make_repo

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
DAGSTER = "benchmarks.peers.dagster_job"
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mini-swe-agent": ("benchmarks.peers.mini_job", ()),
    "inspect_ai": ("benchmarks.peers.inspect_job", ()),
    "Dagster, in process, one at a time": (DAGSTER, ("in_process",)),
    "Dagster, multiprocess": (DAGSTER, ("multiprocess",)),
}


def run_peer(module: str, forks: int, width: int, more: tuple[str, ...]) -> tuple[float, float]:
    """Wall and CPU seconds of one run of a peer, its start included."""
    python = sys.executable if module == DAGSTER else str(PEERS_PYTHON)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder, cpu_of_a_tree() as cpu:
        repo = make_repo(Path(folder) / "repo")
        argv = [python, "-m", module, str(repo), str(forks), str(width), *more]
        began = time.monotonic()
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "MSWEA_SILENT_STARTUP": "1"}
        with Path(folder, "output").open("wb") as output:
            process = cpu.start(argv, env=environ, stdout=output)
            code = process.wait()
        if code:
            msg = f"{module} failed with {code}"
            raise SystemExit(msg)
        return time.monotonic() - began, cpu.seconds()


def main() -> None:
    """Measure and write benchmarks/peers.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=32)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if not PEERS_PYTHON.exists():
        msg = f"{PEERS_PYTHON}: not there; run `make .venv-peers/.installed` first"
        raise SystemExit(msg)
    where = machine()
    forks, width = arguments.forks, arguments.width
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}
    for _ in range(arguments.runs):
        ours = run_job(forks, width)
        walls.setdefault("sandbox_pipeline", []).append(ours.wall_ms)
        cpus.setdefault("sandbox_pipeline", []).append(ours.cpu_ms)
        for name, (module, more) in PEERS.items():
            wall, cpu = run_peer(module, forks, width, more)
            walls.setdefault(name, []).append(wall * 1000 / forks)
            cpus.setdefault(name, []).append(cpu * 1000 / forks)
    rows = [Row(f"{name}: wall a fork", "ms", values) for name, values in walls.items()]
    rows += [Row(f"{name}: CPU a fork", "ms", values) for name, values in cpus.items()]
    text = (
        f"# Results of `make bench-peers`\n\n{where}\n\n{forks} forks, width {width}, starts of "
        f"the processes included. {' '.join((__doc__ or '').split('[--runs 5]')[1].split())}\n\n"
        f"{table(rows)}\n\nHarbor needs Python 3.12 and was not run.\n"
    )
    (ROOT / "benchmarks" / "peers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
