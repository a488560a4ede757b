"""inspect_ai: a sample with one call of its bash tool by its mock model, and the patch as score.

Usage: python -m benchmarks.peers.inspect_job JOB
"""

from asyncio import to_thread
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from inspect_ai import Task
from inspect_ai import eval as run_eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageTool, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
from inspect_ai.solver import TaskState, generate, use_tools
from inspect_ai.tool import bash
from inspect_ai.util import ExecResult, SandboxEnvironment, sandbox, sandboxenv, subprocess

from benchmarks.peers.work import PATCH, Job, clone, inside, remove


@sandboxenv(name="bubblewrap")
class Bubblewrap(SandboxEnvironment):
    def __init__(self, isolation: list[str], folder: Path) -> None:
        self.isolation = isolation
        self.folder = folder

    @classmethod
    async def sample_init(
        cls, task_name: str, config: Any, metadata: dict[str, Any]
    ) -> dict[str, SandboxEnvironment]:
        return {"default": cls(metadata["isolation"], await to_thread(clone, metadata["repo"]))}

    @classmethod
    async def sample_cleanup(
        cls, task_name: str, config: Any, environments: dict[str, Any], interrupted: bool
    ) -> None:
        remove(environments["default"].folder)

    async def exec(self, cmd: list[str], *_: Any, **__: Any) -> ExecResult[str]:
        return await subprocess([*inside(self.isolation, self.folder), *cmd])

    async def write_file(self, file: str, contents: str | bytes) -> None:
        raise NotImplementedError

    async def read_file(self, file: str, text: bool = True) -> Any:
        raise NotImplementedError


@scorer(metrics=[mean()])
def patch() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        [told] = [it for it in state.messages if isinstance(it, ChatMessageTool)]
        diff = await sandbox().exec(["sh", "-c", PATCH])
        return Score(
            value=int(diff.success and not told.error and not told.text), answer=diff.stdout
        )

    return score


def main() -> None:
    job = Job.asked()

    def answer(messages: list[Any], *_: Any) -> ModelOutput:
        name = "mockllm/model"
        if isinstance(messages[-1], ChatMessageTool):
            output = ModelOutput.from_content(name, "done")
        else:
            output = ModelOutput.for_tool_call(name, "bash", {"command": job.command})
        output.usage = ModelUsage()  # else it is counted, by a table from the internet
        return output

    task = Task(
        dataset=[Sample(input="p", metadata=asdict(job)) for _ in range(job.forks)],
        solver=[use_tools(bash()), generate()],
        scorer=patch(),
        sandbox="bubblewrap",
    )
    width = job.width
    with TemporaryDirectory() as logs:
        (log,) = run_eval(
            task, model=get_model("mockllm/model", custom_outputs=answer), display="none",
            max_samples=width, max_subprocesses=width, max_sandboxes=width, log_dir=logs,
        )  # fmt: skip
        if log.status != "success":
            raise SystemExit(f"not every fork did its work: {log.error and log.error.message}")
        scores = [(it.scores or {})["patch"] for it in log.samples or []]
        if not all(it.value == 1 for it in scores):
            raise SystemExit(f"not every fork did its work: {scores}")
        job.done([it.answer or "" for it in scores])


if __name__ == "__main__":
    main()
