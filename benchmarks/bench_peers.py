"""The same work by this project and by what people would use instead, in one run.

Usage: python -m benchmarks.bench_peers [--forks 32] [--slow-forks 8] [--width 8] [--runs 5]

Each fork is a clone of a small repository, one shell command (`true`) in bubblewrap with the same
namespaces and no network, and the patch. The others do that and what they do around it: an agent's
turns with a scripted model (mini-swe-agent), a sample with a tool call, a score and a log
(inspect_ai), a trial with an agent and a verifier (Harbor), four ops (Dagster). This project also
keeps leases, budgets, a durable store, a timeline, a health check and a checked-out workspace that
outlives its worker: compare magnitudes. Before it is measured, each of the others is seen to bring
a changed line back as a patch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.__main__ import machine
from benchmarks.measuring import Row, cpu_of_a_tree, run_job, table
from benchmarks.peers.work import Job
from sandbox_pipeline.sandboxes.bubblewrap import NAMESPACES, PATH_INSIDE, probe_isolation
from tests.conftest import make_repo

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS = "sandbox_pipeline"
CHANGE = "echo changed >> README.md"
SHOWN = ("usr", "bin", "sbin", "lib", "lib64", "etc")
NO_HARBOR = (
    "**Harbor was not run**: it needs Python 3.12 or newer, which was not found; "
    "`make bench-peers PYTHON312=/path/to/python3.12`."
)


@dataclass(frozen=True)
class Peer:
    """One of the others.

    Attributes:
        name: in the table.
        module: its program, in `benchmarks.peers`.
        venv: folder of the environment with its package; empty: this one.
        requirements: file in `benchmarks/peers` with its version; Dagster's is ours.
        executor: Dagster's.
        slow: whether it gets fewer forks.
    """

    name: str
    module: str
    venv: str = ".venv-peers"
    requirements: str = "requirements.txt"
    executor: str = ""
    slow: bool = False

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return ROOT / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    @property
    def is_installed(self) -> bool:
        """Whether its environment is whole."""
        return not self.venv or (ROOT / self.venv / ".installed").exists()


HARBOR = Peer("Harbor", "harbor_job", ".venv-harbor", "requirements-harbor.txt")
PEERS = (
    Peer("mini-swe-agent", "mini_job"),
    HARBOR,
    Peer("inspect_ai", "inspect_job"),
    Peer("Dagster, in process, one at a time", "dagster_job", "", "", "in_process"),
    Peer("Dagster, multiprocess", "dagster_job", "", "", "multiprocess", slow=True),
)


def isolation() -> list[str]:
    """Bubblewrap as a local sandbox of this project has it, without what only that one shows."""
    probe = probe_isolation()
    if probe.bwrap is None:
        raise SystemExit(probe.message)
    argv = [str(probe.bwrap), *NAMESPACES, "--unshare-net"]
    argv += ["--setenv", "PATH", PATH_INSIDE, "--setenv", "HOME", "/tmp"]  # noqa: S108 (inside)
    for name in SHOWN:
        argv += ["--ro-bind-try", f"/{name}", f"/{name}"]
    return [*argv, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 (inside)


def run_peer(peer: Peer, forks: int, width: int, command: str = "true") -> tuple[float, float]:
    """Milliseconds of wall and of CPU a fork in one run of a peer, its start included.

    Raises:
        SystemExit: a fork's patch is missing or not what the command changed.
    """
    with tempfile.TemporaryDirectory(prefix="peers-") as folder, cpu_of_a_tree() as cpu:
        repo = make_repo(Path(folder) / "repo")
        answer = Path(folder) / "answer"
        job = Job(str(repo), forks, width, command, isolation(), str(answer), peer.executor)
        argv = [str(peer.python), "-m", f"benchmarks.peers.{peer.module}", json.dumps(asdict(job))]
        environ = {"PYTHONPATH": str(ROOT), "MSWEA_SILENT_STARTUP": "1", "HARBOR_TELEMETRY": "0"}
        began = time.monotonic()
        with Path(folder, "said").open("w+b") as said:
            env = {**os.environ, **environ}
            code = cpu.start(argv, env=env, stdout=said, stderr=said).wait()
            wall = time.monotonic() - began
            said.seek(0)
            words = said.read().decode(errors="replace")
        patches: list[str] = json.loads(answer.read_text()) if code == 0 else []
        right = ["\n+changed\n" in it if command == CHANGE else it == "" for it in patches]
        if right != [True] * forks:
            msg = f"{words[-4000:]}\n{peer.name}: not every fork did its work: {code=} {patches=}"
            raise SystemExit(msg)
        return wall * 1000 / forks, cpu.seconds() * 1000 / forks


def installed() -> list[Peer]:
    """The peers that can be run.

    Raises:
        SystemExit: one other than Harbor is not installed.
    """
    missing = [peer for peer in PEERS if not peer.is_installed and peer is not HARBOR]
    if missing:
        msg = f"{missing[0].name} is not installed; `make bench-peers` does it"
        raise SystemExit(msg)
    return [peer for peer in PEERS if peer.is_installed]


def rows(measured: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """Wall and CPU of each, then of each to ours, run by run."""
    ours = measured[OURS]
    lines: list[Row] = []
    for place, what in enumerate(("wall", "CPU")):
        for name, runs in measured.items():
            lines.append(Row(f"{name}: {what} a fork", "ms", [run[place] for run in runs]))
    for place, what in enumerate(("wall", "CPU")):
        for name, runs in measured.items():
            if name != OURS:
                ratios = [run[place] / own[place] for run, own in zip(runs, ours, strict=True)]
                lines.append(Row(f"{name} : ours, {what}", "x", ratios))
    return lines


def main() -> None:
    """Measure and write benchmarks/peers.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=32)
    parser.add_argument("--slow-forks", type=int, default=8)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    forks, slow_forks, width = arguments.forks, arguments.slow_forks, arguments.width
    where, peers = machine(), installed()
    for peer in peers:
        run_peer(peer, 2, 2, CHANGE)
    measured: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.runs):
        ours = run_job(forks, width)
        measured.setdefault(OURS, []).append((ours.wall_ms, ours.cpu_ms))
        for peer in peers:
            few = slow_forks if peer.slow else forks
            name = f"{peer.name} ({few} forks)" if peer.slow else peer.name
            measured.setdefault(name, []).append(run_peer(peer, few, width))
    files = sorted({peer.requirements for peer in peers} - {""})
    versions = [line for it in files for line in (HERE / "peers" / it).read_text().split()]
    with cpu_of_a_tree() as cpu:
        exact = cpu.is_exact
    notes = [
        f"{forks} forks, width {width}, starts of the processes included. "
        f"Of the others: {', '.join(versions)}.",
        " ".join((__doc__ or "").split("[--runs 5]")[1].split()),
        *([] if exact else ["**CPU is too low**: no control group could be made here."]),
        table(rows(measured)),
        *([] if HARBOR in peers else [NO_HARBOR]),
    ]
    text = "\n\n".join(["# Results of `make bench-peers`", where, *notes]) + "\n"
    (HERE / "peers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
