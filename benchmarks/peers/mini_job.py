"""mini-swe-agent: its agent, its bubblewrap environment and its scripted model for each fork.

Usage: python -m benchmarks.peers.mini_job JOB
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment
from minisweagent.models.test_models import DeterministicModel, make_output

from benchmarks.peers.work import PATCH, Job, cloned

SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def fork(job: Job, trajectory: Path) -> str:
    with cloned(job.repo) as folder:
        program, *options = job.isolation
        turns = [job.command, f"echo {SUBMIT} && {PATCH}"]
        agent = DefaultAgent(
            DeterministicModel(outputs=[make_output("", [{"command": it}], 0) for it in turns]),
            BubblewrapEnvironment(cwd=str(folder), executable=program, wrapper_args=options),
            system_template="s",
            instance_template="{{task}}",
            output_path=trajectory,
        )
        end = agent.run("p")
    if end["exit_status"] != "Submitted" or "<returncode>0<" not in str(agent.messages[3]):
        raise SystemExit(f"a fork did not do its work: {agent.messages}")
    return end["submission"]


def main() -> None:
    job = Job.asked()
    with TemporaryDirectory() as logs, ThreadPoolExecutor(job.width) as pool:
        files = [Path(logs, f"{number}.json") for number in range(job.forks)]
        job.done(list(pool.map(fork, [job] * job.forks, files)))


if __name__ == "__main__":
    main()
