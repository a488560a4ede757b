"""The `command` agent: any command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from sandbox_pipeline.agents.base import Reporter, Task, job_of
from sandbox_pipeline.agents.detached import Finished, Job, run_detached
from sandbox_pipeline.agents.output import OutputLog
from sandbox_pipeline.agents.transcript import TranscriptWriter
from sandbox_pipeline.agents.usage import PARSERS, parse_usage
from sandbox_pipeline.config import AgentConfig
from sandbox_pipeline.errors import ConfigError, FailureClass
from sandbox_pipeline.records import AgentResult, Outcome
from sandbox_pipeline.sandboxes.base import WORKSPACE, Network, Sandbox

MAX_USAGE_BYTES = 20_000_000


class CommandAgent:
    """Runs `agent.command` in the workspace; exit code 0 is success."""

    kind = "command"
    network: Network = "none"

    def validate(self, config: AgentConfig, environ: Mapping[str, str], *, provider: str) -> None:
        """See `Agent.validate`."""
        if config.usage_format not in PARSERS:
            known = ", ".join(PARSERS)
            msg = f"agent.usage_format: {config.usage_format!r} is unknown; known are: {known}"
            raise ConfigError(msg)
        missing = [name for name in config.env_from if name not in environ]
        if missing:
            msg = f"agent.env_from: not set in this environment: {', '.join(missing)}"
            raise ConfigError(msg)

    def mounts(self, config: AgentConfig, environ: Mapping[str, str]) -> Mapping[str, str]:
        """See `Agent.mounts`."""
        return {}

    async def run(self, sandbox: Sandbox, task: Task, reporter: Reporter) -> AgentResult:
        """See `Agent.run`."""
        argv = fill_template(task)
        job = Job(
            argv=argv,
            timeout_seconds=task.config.timeout_seconds,
            max_output_bytes=int(task.config.max_output_mb * 1e6),
            env=agent_env(task),
            idle_timeout_seconds=task.config.idle_timeout_seconds,
        )
        last = ""
        with TranscriptWriter(task.artifacts / "transcript.jsonl", task.redactor) as transcript:
            transcript.add("prompt", task.prompt)

            def on_lines(stream: str, lines: list[str]) -> None:
                nonlocal last
                if not transcript.truncated:
                    for line in lines:
                        transcript.add("output", line, name=stream)
                last = next((line for line in reversed(lines) if line.strip()), last)

            with OutputLog(task.artifacts, task.redactor, on_lines) as log:

                async def tell() -> None:
                    if last:
                        await reporter.progress(last.strip())

                async def on_output(stream: str, chunk: bytes) -> None:
                    with transcript.many():
                        await log.feed(stream, chunk)
                    await tell()

                finished = await run_detached(sandbox, job_of(task.attempt), job, on_output)
                log.finish()
                await tell()
            report = parse_usage(task.config.usage_format, _end_of_output(task))
            result = _result(finished, argv[0], last.strip()[-500:], task.config)
            result = result.model_copy(
                update={
                    "secret_leak": log.leaked or transcript.leaked,
                    "usage": report.usage,
                    "turns": report.turns,
                    "model": report.model,
                    "cost_basis": "unknown" if report.usage.cost_usd is None else "reported",
                }
            )
            transcript.add("result", result.message, data={"exit_code": result.exit_code})
        return result


def fill_template(task: Task) -> list[str]:
    """The command's arguments with the placeholders replaced; each stays one argument."""
    values = {
        "{prompt_file}": task.prompt_path,
        "{workspace}": WORKSPACE,
        "{model}": task.model,
        "{fork_num}": str(task.fork_num),
    }
    argv = shlex.split(task.config.command or "")
    for name, value in values.items():
        argv = [part.replace(name, value) for part in argv]
    return argv


def agent_env(task: Task) -> dict[str, str]:
    """The agent's own environment: what was configured, and who commits if it commits."""
    return {
        "SANDBOX_PIPELINE_WORKFLOW_ID": task.workflow_id,
        "SANDBOX_PIPELINE_FORK_NUM": str(task.fork_num),
        **task.config.env,
        **{name: task.environ[name] for name in task.config.env_from},
    }


def why_timed_out(finished: Finished, config: AgentConfig) -> str:
    """Which limit of time the agent exceeded."""
    if finished.was_idle:
        limit = f"agent.idle_timeout_seconds ({config.idle_timeout_seconds or 0:g} s)"
        return f"the agent gave no output for longer than {limit}"
    return f"the agent worked longer than agent.timeout_seconds ({config.timeout_seconds:g} s)"


def _end_of_output(task: Task) -> str:
    """What the usage is read from; agents report it last."""
    path = task.artifacts / "stdout.log"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_USAGE_BYTES))
        return file.read().decode("utf-8", "replace")


def _result(finished: Finished, program: str, said: str, config: AgentConfig) -> AgentResult:
    truncated = finished.truncated
    code = finished.exit_code
    if finished.timed_out:
        return AgentResult(
            outcome=Outcome.TIMEOUT,
            exit_code=code,
            message=why_timed_out(finished, config),
            output_truncated=truncated,
        )
    if code == 0:
        return AgentResult(
            outcome=Outcome.SUCCESS, exit_code=0, message=said, output_truncated=truncated
        )
    if code == 127:
        why = f"command not found in the sandbox: {program}"
    elif code == 126:
        why = f"command is not executable in the sandbox: {program}"
    elif code > 128:
        why = f"the agent was killed by signal {code - 128}"
    else:
        why = f"the agent exited with code {code}"
    return AgentResult(
        outcome=Outcome.FAILED,
        failure_class=FailureClass.AGENT_FAILED,
        exit_code=code,
        message=f"{why}: {said}" if said and code not in (126, 127) else why,
        output_truncated=truncated,
    )
