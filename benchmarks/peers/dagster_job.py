"""Stock Dagster: four ops a fork, without the store, the leases and the sandbox of this project.

Usage: python -m benchmarks.peers.dagster_job JOB
"""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from benchmarks.peers.work import PATCH, Job, clone, inside, remove


class Settings(dg.ConfigurableResource):
    repo: str
    forks: int
    command: str
    isolation: list[str]

    def run(self, folder: str, command: str) -> str:
        argv = [*inside(self.isolation, folder), "sh", "-c", command]
        return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


@dg.op(out=dg.DynamicOut(int))
def plan(job: Settings) -> Iterator[dg.DynamicOutput[int]]:
    for number in range(job.forks):
        yield dg.DynamicOutput(number, mapping_key=f"fork_{number}")


@dg.op
def create(number: int, job: Settings) -> str:
    return str(clone(job.repo))


@dg.op
def agent(folder: str, job: Settings) -> str:
    job.run(folder, job.command)
    return folder


@dg.op
def metrics(folder: str, job: Settings) -> tuple[str, str]:
    return folder, job.run(folder, PATCH)


@dg.op
def cleanup(done: tuple[str, str]) -> str:
    folder, patch = done
    remove(Path(folder))
    return patch


@dg.op
def collect(patches: list[str]) -> list[str]:
    return patches


@dg.job(resource_defs={"job": Settings.configure_at_launch()})
def forks() -> None:
    collect(plan().map(lambda number: cleanup(metrics(agent(create(number))))).collect())


def main() -> None:
    job = Job.asked()
    limit = {} if job.executor == "in_process" else {"max_concurrent": job.width}
    settings = {name: getattr(job, name) for name in ("repo", "forks", "command", "isolation")}
    run_config = {
        "execution": {"config": {job.executor: limit}},
        "resources": {"job": {"config": settings}},
        "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
    }
    with (
        tempfile.TemporaryDirectory() as home,
        dg.DagsterInstance.local_temp(home) as instance,
        dg.execute_job(
            dg.reconstructable(forks), instance=instance, run_config=run_config
        ) as result,
    ):
        if not result.success:
            raise SystemExit("not every fork did its work")
        job.done(result.output_for_node("collect"))


if __name__ == "__main__":
    main()
