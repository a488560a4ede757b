"""Orchestrations under seeded random kills: `python -m tests.faults.random_kills --n 300 --seed 1`.

Each orchestration is run by a forked worker that is killed, cut off or told to cancel at random
moments, and started again until it is complete. E2B's API is killed too, and comes back within a
second; its sandboxes live on. Then the provider's own truth (processes here, the server's ledger
for E2B) is compared with the store.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from sandbox_pipeline.config import parse_config
from sandbox_pipeline.errors import OwnershipError
from sandbox_pipeline.instance import ensure_home
from sandbox_pipeline.reaper import reap
from sandbox_pipeline.records import (
    Control,
    Event,
    Fork,
    Orchestration,
    fork_key,
    orchestration_key,
)
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.store import tables
from sandbox_pipeline.testing import drive
from tests.conftest import make_repo
from tests.processes import live_sandboxes
from tests.servers.e2b_server import Ledger

CANARY = "canary-5e1f8a6b7c90d2"
FORKS = 3
LANES = 2
REFUSED = 3
ATTEMPTS = 5
MOST_RUNS = 12
GRACE_SECONDS = 15
PATIENCE_SECONDS = 60
AGENT = (
    "sh -c 'echo run >> {workspace}/runs; echo $CANARY; echo $CANARY > {workspace}/leak; "
    "echo $CANARY | base64; sleep 0.3'"
)


@dataclass
class Found:
    """What one orchestration came to."""

    workflow_id: str
    deeds: list[str] = field(default_factory=list[str])
    runs: int = 0
    outcomes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])


class Campaign:
    """The orchestrations of one provider, which share a deployment."""

    def __init__(self, provider: str, folder: Path, environ: dict[str, str]) -> None:
        self.provider = provider
        self.home = folder / "home"
        self.ledger_path = folder / "ledger.jsonl"
        self.environ = {**os.environ, **environ, "CANARY": CANARY}
        self.admin = environ.get("ADMIN_URL", "")
        self.front = folder / "front.pid"
        self.repo = make_repo(folder / "repo")
        ensure_home(self.home)

    def config(self, workflow_id: str) -> dict[str, Any]:
        return {
            "workflow_id": workflow_id,
            "repo_url": str(self.repo),
            "prompt": "do it",
            "num_forks": FORKS,
            "max_concurrent": 2,
            "agent": {"command": AGENT, "env_from": ["CANARY"], "timeout_seconds": 60},
            "sandbox": {
                "provider": self.provider,
                "orphan_grace_seconds": GRACE_SECONDS,
                **({"isolation": "none"} if self.provider == "local" else {}),
            },
            "retry": {"attempts": ATTEMPTS, "initial_seconds": 0.05, "max_seconds": 1},
            "rate_limit": {"starts": 1000, "window_ms": 1},
        }

    def live(self, workflow_id: str = "") -> list[str]:
        """Sandboxes alive by the provider's own truth; those of one orchestration by its leases."""
        if self.provider == "e2b":
            wanted = {"workflow_id": workflow_id} if workflow_id else {}
            return Ledger.load(self.ledger_path).live(**wanted)
        ours = live_sandboxes(self.home)
        if not workflow_id:
            return ours
        metas = {name: self.home / "sandboxes" / name / "meta.json" for name in ours}
        return [name for name, path in metas.items() if workflow_id in _text(path)]

    def cut(self, chance: random.Random) -> str:
        """Spoil one of the next requests to the server."""
        rule = {
            "path": chance.choice(["/v2/sandboxes", "/sandboxes/.*", ".*"]),
            "first": chance.randint(1, 5),
            "times": chance.randint(1, 2),
            "when": chance.choice(["before", "after"]),
            "drop": True,
        }
        httpx.post(f"{self.admin}/admin/faults", json=[rule]).raise_for_status()
        return f"cut {rule['path']}"

    def worker(self, workflow_id: str, run_id: str) -> int:
        """A forked process that runs the orchestration to its end; its pid."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(os.open(self.home / "workers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            asyncio.run(self._drive(workflow_id, run_id))
            code = 0
        except OwnershipError:
            code = REFUSED
        except BaseException:  # noqa: BLE001 - whatever it is, the parent sees the code
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    async def _drive(self, workflow_id: str, run_id: str) -> None:
        runtime = Runtime.open(home=self.home, environ=self.environ)
        config = parse_config(self.config(workflow_id))
        await drive(runtime, config, workflow_id, run_id=run_id)
        await runtime.close()

    def ask(self, work: Callable[[Runtime], Any]) -> Any:
        async def call() -> Any:
            runtime = Runtime.open(home=self.home, environ=self.environ)
            try:
                return await work(runtime)
            finally:
                await runtime.close()

        return asyncio.run(call())

    def one(self, number: int, seed: int) -> Found:
        """One orchestration, tormented, then brought to its end and looked at."""
        chance = random.Random(f"{self.provider}-{seed}-{number}")  # noqa: S311 - repeatable
        workflow_id = f"r{seed}-{number}"
        found = Found(workflow_id)
        torments = chance.choice([0, 1, 1, 1, 2, 2, 3])
        while found.runs < MOST_RUNS:
            found.runs += 1
            pid = self.worker(workflow_id, f"{workflow_id}-run-{found.runs}")
            if found.runs <= torments:
                self._torment(chance, found, pid)
            code = _wait(pid)
            if code == 0:
                break
            if code is None:
                found.problems.append("a worker did not end")
                break
        else:
            found.problems.append("never complete")
        self._judge(found)
        return found

    def _torment(self, chance: random.Random, found: Found, pid: int) -> None:
        time.sleep(chance.random() * 1.3)
        deeds: dict[str, int] = {"kill worker": 6, "cancel fork": 1, "cancel": 1, "second run": 1}
        if self.provider == "local":
            deeds["kill supervisor"] = 2
        else:
            deeds |= {"cut": 4, "kill server": 3}
        deed = chance.choices(list(deeds), list(deeds.values()))[0]
        workflow_id = found.workflow_id
        if deed == "kill worker":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif deed == "kill supervisor":
            _kill_supervisors(self.live(workflow_id), chance)
        elif deed == "cut":
            deed = self.cut(chance)
        elif deed == "kill server":
            with contextlib.suppress(ProcessLookupError):  # still dead
                os.kill(int(self.front.read_text(encoding="ascii")), signal.SIGKILL)
        elif deed == "second run":
            code = _wait(self.worker(workflow_id, f"{workflow_id}-second-{found.runs}"))
            # Where the first was through already, the second finds nothing to do.
            deed += {REFUSED: ": refused", 0: ": nothing to do"}.get(code or 0, f": {code}")
        else:
            fork_num = chance.randrange(FORKS) if deed == "cancel fork" else None
            self.ask(lambda runtime: _cancel(runtime, workflow_id, fork_num))
        found.deeds.append(deed)

    def _judge(self, found: Found) -> None:
        workflow_id = found.workflow_id
        deadline = time.monotonic() + GRACE_SECONDS + 5
        while (alive := self.live(workflow_id)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if alive:
            found.problems.append(f"leaked: {alive}")
        if self.provider == "e2b":
            ledger = Ledger.load(self.ledger_path)
            for number in range(FORKS):
                if ledger.max_live(workflow_id=workflow_id, fork_num=str(number)) > 1:
                    found.problems.append(f"fork {number} had two sandboxes at once")

        orchestration, forks, rows, events = self._read(workflow_id)
        if orchestration is not None and not orchestration.complete:
            # Where the provider was away at the end, the reaper is to confirm that nothing lives.
            self.ask(reap)
            orchestration, forks, rows, events = self._read(workflow_id)
        found.outcomes = [fork.outcome.value for fork in forks]
        if orchestration is None or not orchestration.complete:
            found.problems.append("not complete")
        if [row["fork_num"] for row in rows] != list(range(FORKS)):
            found.problems.append(f"rows: {[row['fork_num'] for row in rows]}")
        for fork in forks:
            mine = [event for event in events if event.fork_num == fork.fork_num]
            found.problems += [f"fork {fork.fork_num} {text}" for text in _wrong(fork, mine)]

    def _read(self, workflow_id: str) -> tuple[Any, ...]:
        async def read(runtime: Runtime) -> tuple[Any, ...]:
            key = orchestration_key(workflow_id)
            return (
                await runtime.store.get(Orchestration, key),
                await runtime.store.forks(workflow_id),
                await runtime.store.rows(tables.fork_metrics, workflow_id),
                await runtime.store.events(workflow_id),
            )

        return self.ask(read)

    def canaries(self) -> list[str]:
        """Files of the deployment in which the secret is."""
        needles = [CANARY.encode(), base64.b64encode(CANARY.encode())[:-4]]
        return [
            str(path)
            for path in self.home.rglob("*")
            if path.is_file() and any(needle in path.read_bytes() for needle in needles)
        ]


def _wrong(fork: Fork, events: list[Event]) -> list[str]:
    """What must never be true of a fork at its end."""
    saved = [event.seq for event in events if event.name == "agent-completed"]
    begun_again = [event.seq for event in events if event.name == "agent-retried"]
    patch = fork.patch.path if fork.patch is not None else None
    runs = Path(patch).read_text(encoding="utf-8").count("+run\n") if patch else 0
    failure = fork.failure_class.value if fork.failure_class is not None else ""
    claims = {
        f"is not ended but {fork.outcome.value}": not fork.outcome.is_terminal,
        "was run again after its result": len(saved) > 1
        or any(seq > saved[0] for seq in begun_again if saved),
        f"was run again, {runs} times in one sandbox": runs > 1,
        "had too many attempts": fork.attempts.get("agent", 0) > ATTEMPTS,
        f"is lost: {failure}: {fork.message}": failure in ("lost", "internal"),
    }
    return [text for text, wrong in claims.items() if wrong]


async def _cancel(runtime: Runtime, workflow_id: str, fork_num: int | None) -> None:
    with contextlib.suppress(KeyError):
        if fork_num is not None:
            key = fork_key(workflow_id, fork_num)
            await runtime.store.update(Fork, key, lambda it: it.evolve(control=Control.CANCEL))
            return
        key = orchestration_key(workflow_id)
        await runtime.store.update(Orchestration, key, lambda it: it.evolve(control=Control.CANCEL))


def _kill_supervisors(names: list[str], chance: random.Random) -> None:
    if not names:
        return
    name = chance.choice(sorted(names))
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.info["cmdline"] or [])
            if "supervisor.py" in line and name in line:
                process.kill()


def _wait(pid: int) -> int | None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""


@contextlib.contextmanager
def _server(folder: Path, provider: str, seed: int) -> Generator[dict[str, str]]:
    if provider == "local":
        yield {}
        return
    ledger = folder / "ledger.jsonl"
    ledger.touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.e2b_server", "--ledger", str(ledger)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(3)]
    environ = dict(line.partition("=")[::2] for line in lines)
    behind = environ["E2B_API_URL"]
    front = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.e2b_server.front", "--pid-file",
         str(folder / "front.pid"), "--port", behind.rpartition(":")[2], "--seed", str(seed)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert front.stdout is not None
    url = front.stdout.readline().strip()
    try:
        yield {**environ, "E2B_API_URL": url, "E2B_SANDBOX_URL": url, "ADMIN_URL": behind}
    finally:
        for each in (front, process):
            each.terminate()
            each.wait(30)


def run(provider: str, count: int, seed: int, folder: Path) -> list[Found]:
    """All orchestrations of one provider, in `LANES` processes."""
    with _server(folder, provider, seed) as environ:
        campaign = Campaign(provider, folder, environ)
        campaign.ask(lambda runtime: runtime.deployment_id())
        lanes: list[int] = []
        for lane in range(LANES):
            pid = os.fork()
            if pid == 0:
                with (folder / f"lane-{lane}.jsonl").open("w", encoding="utf-8") as file:
                    for number in range(lane, count, LANES):
                        file.write(json.dumps(asdict(campaign.one(number, seed))) + "\n")
                        file.flush()
                os._exit(0)
            lanes.append(pid)
        for pid in lanes:
            os.waitpid(pid, 0)
        found = [
            Found(**json.loads(line))
            for lane in range(LANES)
            for line in (folder / f"lane-{lane}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        general = Found("all")
        if len(found) != count:
            general.problems.append(f"a lane broke off after {len(found)} orchestrations")
        if alive := campaign.live():
            general.problems.append(f"leaked: {alive}")
        if files := campaign.canaries():
            general.problems.append(f"canary in {files}")
        return [*found, general]


def main() -> int:
    """Print a table; the exit code is 1 where anything was not as promised."""
    parser = argparse.ArgumentParser(prog="tests.faults.random_kills", description=__doc__)
    parser.add_argument("--n", type=int, default=300, help="orchestrations of each provider")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--provider", choices=["local", "e2b", "both"], default="both")
    parser.add_argument("--keep", action="store_true", help="leave the folder for a look")
    arguments = parser.parse_args()
    pids: list[int] = []
    for provider in ("local", "e2b"):
        if arguments.provider in (provider, "both"):
            pid = os.fork()
            if pid == 0:
                os._exit(_campaign(provider, arguments))
            pids.append(pid)
    return int(any([os.waitpid(pid, 0)[1] for pid in pids]))


def _campaign(provider: str, arguments: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix=f"random-kills-{provider}-"))
    began = time.monotonic()
    found = run(provider, arguments.n, arguments.seed, folder)
    bad = _report(provider, arguments.seed, found, time.monotonic() - began)
    if arguments.keep:
        print(f"  kept: {folder}", flush=True)  # noqa: T201
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bad)


def _report(provider: str, seed: int, found: list[Found], seconds: float) -> bool:
    deeds = collections.Counter(deed for item in found for deed in item.deeds)
    outcomes = collections.Counter(outcome for item in found for outcome in item.outcomes)
    kinds = {
        "leaked sandboxes": "leaked",
        "rows lost or doubled": "rows",
        "forks lost": "is lost",
        "agents run again": "run again",
        "canary hits": "canary",
    }
    problems = [(item.workflow_id, text) for item in found for text in item.problems]
    lines = [
        f"{provider}: {len(found) - 1} orchestrations of {FORKS} forks, seed {seed}, "
        f"{seconds:.0f} s, {sum(item.runs for item in found)} runs",
        f"  done to them: {dict(deeds.most_common())}",
        f"  outcomes: {dict(outcomes.most_common())}",
        *(
            f"  {name}: {sum(word in text.split(':')[0] for _, text in problems)}"
            for name, word in kinds.items()
        ),
        *(f"  PROBLEM {workflow_id}: {text}" for workflow_id, text in problems),
    ]
    print("\n".join(lines), flush=True)  # noqa: T201
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
