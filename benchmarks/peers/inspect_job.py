"""inspect_ai: one sample a fork, its solver runs the command; no model is asked.

Usage: python -m benchmarks.peers.inspect_job REPO FORKS WIDTH
"""

import sys
import tempfile
from typing import Any

from inspect_ai import Task
from inspect_ai import eval as run_eval
from inspect_ai.dataset import Sample
from inspect_ai.solver import Generate, TaskState, solver
from inspect_ai.util import subprocess

from benchmarks.peers.work import clone, in_bubblewrap


@solver
def one_command(repo: str) -> Any:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        with clone(repo) as folder:
            for command in ("true", "git diff HEAD"):
                done = await subprocess(in_bubblewrap(f"{folder}/repo", command))
                if not done.success:
                    raise RuntimeError(done.stderr)
        return state

    return solve


def main() -> None:
    repo, forks, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    task = Task(dataset=[Sample(input="p") for _ in range(forks)], solver=one_command(repo))
    with tempfile.TemporaryDirectory() as logs:
        (log,) = run_eval(task, model="mockllm/model", display="none", max_samples=width,
                          max_subprocesses=width, log_dir=logs)  # fmt: skip
        done = [sample for sample in log.samples or [] if sample.error is None]
        if log.status != "success" or len(done) != forks:
            raise SystemExit(f"not every fork succeeded: {log.status} {log.error}")


if __name__ == "__main__":
    main()
