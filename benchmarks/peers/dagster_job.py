"""Stock Dagster: four ops a fork, without the store, the leases and the sandbox of this project.

Usage: python -m benchmarks.peers.dagster_job REPO FORKS WIDTH in_process|multiprocess
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator

import dagster as dg

from benchmarks.peers.work import clone, in_bubblewrap


@dg.op(config_schema={"repo": str, "forks": int}, out=dg.DynamicOut(str))
def plan(context: dg.OpExecutionContext) -> Iterator[dg.DynamicOutput[str]]:
    for number in range(context.op_config["forks"]):
        yield dg.DynamicOutput(context.op_config["repo"], mapping_key=f"fork_{number}")


@dg.op
def create(repo: str) -> str:
    folder = clone(repo)
    folder._finalizer.detach()  # another process removes it
    return folder.name


@dg.op
def agent(folder: str) -> str:
    subprocess.run(in_bubblewrap(f"{folder}/repo", "true"), check=True)
    return folder


@dg.op
def metrics(folder: str) -> str:
    subprocess.run(in_bubblewrap(f"{folder}/repo", "git diff HEAD"), check=True)
    return folder


@dg.op
def cleanup(folder: str) -> int:
    subprocess.run(["rm", "-rf", folder], check=True)
    return 1


@dg.op
def collect(done: list[int]) -> int:
    return sum(done)


@dg.job
def forks() -> None:
    collect(plan().map(lambda repo: cleanup(metrics(agent(create(repo))))).collect())


def main() -> None:
    repo, number, width, executor = sys.argv[1:]
    execution = {"in_process": {}} if executor == "in_process" else {
        "multiprocess": {"max_concurrent": int(width)}
    }  # fmt: skip
    run_config = {
        "execution": {"config": execution},
        "ops": {"plan": {"config": {"repo": repo, "forks": int(number)}}},
        "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
    }
    with (
        tempfile.TemporaryDirectory() as home,
        dg.DagsterInstance.local_temp(home) as instance,
        dg.execute_job(
            dg.reconstructable(forks), instance=instance, run_config=run_config
        ) as result,
    ):
        if not result.success or result.output_for_node("collect") != int(number):
            msg = "not every fork succeeded"
            raise SystemExit(msg)


if __name__ == "__main__":
    main()
