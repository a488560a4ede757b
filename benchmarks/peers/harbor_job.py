"""Harbor: a trial of a local task a fork, by its oracle agent and its verifier, in bubblewrap.

The oracle runs the task's solution, which is the command; the verifier takes the patch.

Usage: python -m benchmarks.peers.harbor_job JOB (Python 3.12 or newer)
"""

import asyncio
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.environments.capabilities import EnvironmentCapabilities
from harbor.job import Job as HarborJob
from harbor.models.job.config import JobConfig
from harbor.models.trial.result import TrialResult

from benchmarks.peers.work import PATCH, Job, clone, inside, remove

LOGS = "/logs/verifier"
FILES = {
    "task.toml": 'schema_version = "1.4"\n[environment]\nnetwork_mode = "no-network"\n',
    "instruction.md": "p\n",
    "environment/README": "the clone of the repository\n",
    "tests/test.sh": f"#!/bin/sh -e\n{PATCH} > {LOGS}/patch\necho 1 > {LOGS}/reward.txt\n",
}
OWN = ("/solution", "/tests")


class Bubblewrap(BaseEnvironment):
    def __init__(self, *args: Any, repo: str, isolation: list[str], **more: Any) -> None:
        super().__init__(*args, **more)
        self.repo = repo
        self.isolation = isolation

    @staticmethod
    def type() -> str:
        return "bubblewrap"

    @property
    def capabilities(self) -> EnvironmentCapabilities:
        return EnvironmentCapabilities(disable_internet=True, mounted=True)

    def _validate_definition(self) -> None:
        pass

    async def start(self, force_build: bool) -> None:
        self.folder = await asyncio.to_thread(clone, self.repo)
        self.argv = inside(self.isolation, self.folder)
        for mount in self._mounts:
            self.argv += ["--bind", mount["source"], mount["target"]]
        for name in OWN:
            self._here(name).mkdir()
            self.argv += ["--bind", str(self._here(name)), name]

    async def stop(self, delete: bool) -> None:
        remove(self.folder)

    def _here(self, path: str) -> Path:
        return Path(f"{self.folder.parent}{path}")

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        shutil.copytree(source_dir, self._here(target_dir), dirs_exist_ok=True)

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        raise NotImplementedError

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        raise NotImplementedError

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        raise NotImplementedError

    async def exec(
        self, command: str, cwd: Any = None, env: Any = None, timeout_sec: Any = None,
        user: Any = None,
    ) -> ExecResult:  # fmt: skip
        variables = [it for pair in (env or {}).items() for it in ("--setenv", *pair)]
        process = await asyncio.create_subprocess_exec(
            *self.argv, *variables, "bash", "-c", command,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        code = process.returncode
        return ExecResult(stdout=out.decode(), stderr=err.decode(), return_code=code)


def config_of(job: Job, folder: Path) -> JobConfig:
    for name, text in {**FILES, "solution/solve.sh": f"#!/bin/sh\n{job.command}\n"}.items():
        file = folder / "task" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return JobConfig.model_validate({
        "job_name": "job",
        "jobs_dir": folder,
        "n_attempts": job.forks,
        "n_concurrent_trials": job.width,
        "quiet": True,
        "tasks": [{"path": folder / "task"}],
        "agents": [{"name": "oracle"}],
        "environment": {
            "import_path": "benchmarks.peers.harbor_job:Bubblewrap",
            "kwargs": {"repo": job.repo, "isolation": job.isolation},
        },
    })  # fmt: skip


async def run(config: JobConfig) -> list[TrialResult]:
    return (await (await HarborJob.create(config)).run()).trial_results


def main() -> None:
    job = Job.asked()
    with TemporaryDirectory() as name:
        folder = Path(name)
        results = asyncio.run(run(config_of(job, folder)))
        failed = [it.exception_info for it in results if it.exception_info]
        rewards = [it.verifier_result and it.verifier_result.rewards for it in results]
        codes = list(folder.glob("job/*/agent/exit-code.txt"))
        if failed or codes or rewards != [{"reward": 1}] * job.forks:
            raise SystemExit(f"not every fork did its work: {rewards} {codes} {failed}")
        job.done([it.read_text() for it in folder.glob("job/*/verifier/patch")])


if __name__ == "__main__":
    main()
