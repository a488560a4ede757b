"""Runs a command inside a sandbox apart from this process, and follows it by its files.

The command's output and exit code go to files in the sandbox. A dropped connection, a
restarted orchestrator and a three-hour agent are then the same case: look at the files.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sandbox_pipeline.errors import AgentError, FailureClass
from sandbox_pipeline.sandboxes.base import HOME, STATE_DIR, WORKSPACE, Command, Sandbox

STREAMS = ("stdout", "stderr")
KILL_AFTER_SECONDS = 5
CHUNK_BYTES = 1_000_000
LIVENESS_CHECK_SECONDS = 10.0
OVERDUE_SECONDS = 30.0

OnOutput = Callable[[str, bytes], Awaitable[None]]


@dataclass(frozen=True)
class Job:
    """A long command.

    Attributes:
        stdin_path: file inside the sandbox that becomes its standard input.
        timeout_seconds: then SIGINT, and SIGKILL `KILL_AFTER_SECONDS` later, from inside.
        max_output_bytes: of each stream; what comes after is counted and dropped.
        idle_timeout_seconds: without output for so long it is stopped too; None: never.
    """

    argv: Sequence[str]
    timeout_seconds: float
    max_output_bytes: int
    cwd: str = WORKSPACE
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    stdin_path: str = "/dev/null"
    idle_timeout_seconds: float | None = None


@dataclass(frozen=True)
class Finished:
    """How a job ended.

    Attributes:
        exit_code: as a shell reports it, 128 + n for signal n.
        timed_out: it was stopped because it ran too long, or was silent for too long.
        was_idle: it was the latter.
        seconds: how long it ran, by the sandbox's own clock.
        dropped_bytes: output beyond `max_output_bytes`, both streams.
    """

    exit_code: int
    timed_out: bool
    seconds: float
    dropped_bytes: int
    was_idle: bool = False


# mkdir is atomic: a second start of the same job finds `started` and does nothing. head stops at
# the cap, and without stdbuf would hold back what it has read; wc then drains and counts the rest,
# so that the command never blocks on a full pipe. Children that outlive the command may hold the
# pipes open, so the wait for the copies is bounded.
_SCRIPT = """\
home=$1
cd {folder} || exit 1
mkdir started 2>/dev/null || exit 0
echo $$ > pid
mkfifo out.pipe err.pipe
(stdbuf -o0 head -c {cap} > stdout; wc -c > stdout.dropped) < out.pipe &
out=$!
(stdbuf -o0 head -c {cap} > stderr; wc -c > stderr.dropped) < err.pipe &
err=$!
read -r began rest < /proc/uptime
(cd {cwd} && exec timeout --signal=INT --kill-after={kill_after} {seconds} {argv}) \\
  < {stdin} > out.pipe 2> err.pipe
code=$?
read -r ended rest < /proc/uptime
(sleep 2; kill $out $err) 2>/dev/null &
watchdog=$!
wait $out $err
kill $watchdog 2>/dev/null
lost=0 more=0
read -r lost < stdout.dropped
read -r more < stderr.dropped
echo "$code $began $ended $((lost + more))" > exit.tmp
mv exit.tmp exit
"""


# Not by pkill, which small images lack. The fourth field is the parent.
_INTERRUPT = """\
parent=$(cat "$1/pid") || exit 1
for stat in /proc/[0-9]*/stat; do
  read -r line < "$stat" || continue
  case "$line" in
    *" (timeout) "?" $parent "*) kill -INT "${line%% *}" && break ;;
  esac
  line=
done 2> /dev/null
[ -n "$line" ] || exit 1
turn=0
while [ $turn -lt "$2" ] && ! [ -e "$1/exit" ]; do sleep 0.1; turn=$((turn + 1)); done
exit 0
"""


_HOME_MENTIONED = re.compile(rf"(?<![\w./-]){re.escape(HOME)}(?![\w.-])")


def folder_of(name: str) -> str:
    """Where a job's files are inside the sandbox."""
    return f"{STATE_DIR}/{name}"


async def run_detached(sandbox: Sandbox, name: str, job: Job, on_output: OnOutput) -> Finished:
    """Start a job unless it was started before, and follow it to its end.

    Args:
        sandbox: where it runs.
        name: of the job; the same name in the same sandbox is the same job.
        job: what to run.
        on_output: hears `("stdout" | "stderr", bytes)`, from the first byte on, also where
            the job was started by an earlier process.

    Raises:
        AgentError: the job's own runner was killed from within.
        ProviderError: the sandbox failed.
    """
    folder = folder_of(name)
    await _start(sandbox, folder, job)
    silence = _Silence(job.idle_timeout_seconds)

    async def hear(stream: str, chunk: bytes) -> None:
        silence.ended()
        await on_output(stream, chunk)

    async def stop_if_idle() -> None:
        if silence.is_too_long():
            await interrupt(sandbox, name)

    finished = await _follow(sandbox, folder, job, hear, stop_if_idle)
    return replace(finished, timed_out=True, was_idle=True) if silence.stopped else finished


async def interrupt(sandbox: Sandbox, name: str, *, wait_seconds: float = 0.0) -> bool:
    """Stop a job as its time-out would: SIGINT, and SIGKILL `KILL_AFTER_SECONDS` later.

    Args:
        sandbox: where it runs.
        name: of the job.
        wait_seconds: for its end, at most.

    Returns:
        Whether there was one to stop.
    """
    turns = str(round(wait_seconds * 10))
    found = await sandbox.run(Command(["sh", "-c", _INTERRUPT, "sh", folder_of(name), turns]))
    return found.exit_code == 0


def _quoted(text: str) -> str:
    """A word of the script; the home in it is the script's argument, since it may be elsewhere.

    Without isolation the local provider translates what commands mention, but no files.
    """
    escaped = text.replace("'", "'\"'\"'")
    return "'" + _HOME_MENTIONED.sub("'\"$home\"'", escaped) + "'"


class _Silence:
    """How long nothing was heard of a job; too long only once."""

    def __init__(self, limit_seconds: float | None) -> None:
        self._limit_seconds = limit_seconds
        self._since = time.monotonic()
        self.stopped = False

    def ended(self) -> None:
        self._since = time.monotonic()

    def is_too_long(self) -> bool:
        if self._limit_seconds is None or self.stopped:
            return False
        self.stopped = time.monotonic() - self._since > self._limit_seconds
        return self.stopped


async def _start(sandbox: Sandbox, folder: str, job: Job) -> None:
    script = _SCRIPT.format(
        folder=_quoted(folder),
        cap=job.max_output_bytes,
        cwd=_quoted(job.cwd),
        kill_after=KILL_AFTER_SECONDS,
        seconds=job.timeout_seconds,
        argv=" ".join(map(_quoted, job.argv)),
        stdin=_quoted(job.stdin_path),
    )
    path = f"{folder}/run.sh"
    await sandbox.write(path, script.encode("utf-8", "surrogateescape"))
    launch = f"setsid nohup sh {path} {HOME} < /dev/null > /dev/null 2>&1 &"
    # By the environment and not in the script: it may hold secrets, and files are forgotten.
    await sandbox.run(Command(["sh", "-c", launch], env=job.env))


async def _follow(
    sandbox: Sandbox,
    folder: str,
    job: Job,
    on_output: OnOutput,
    between: Callable[[], Awaitable[None]],
) -> Finished:
    offsets = dict.fromkeys(STREAMS, 0)
    loop = asyncio.get_running_loop()
    began = checked = loop.time()
    while True:
        ended = await _read(sandbox, f"{folder}/exit", 0, 200)
        grew = False
        for stream in STREAMS:
            path = f"{folder}/{stream}"
            while chunk := await _read(sandbox, path, offsets[stream], CHUNK_BYTES):
                offsets[stream] += len(chunk)
                grew = True
                await on_output(stream, chunk)
                if len(chunk) < CHUNK_BYTES:
                    break
        if ended:
            if grew:
                continue
            return _finished(ended, job)
        now = loop.time()
        if now - checked > LIVENESS_CHECK_SECONDS:
            checked = now
            await _check_alive(sandbox, folder)
        if now - began > job.timeout_seconds + KILL_AFTER_SECONDS + OVERDUE_SECONDS:
            return Finished(137, timed_out=True, seconds=now - began, dropped_bytes=0)
        await between()
        # The pause bounds what a finished agent's sandbox idles, paid for, to 2% of its work.
        await asyncio.sleep(min(1.0, max(0.02, 0.02 * (now - began))))


async def _read(sandbox: Sandbox, path: str, offset: int, max_bytes: int) -> bytes:
    try:
        return await sandbox.read(path, offset=offset, max_bytes=max_bytes)
    except FileNotFoundError:
        return b""


async def _check_alive(sandbox: Sandbox, folder: str) -> None:
    script = "test -e exit || kill -0 $(cat pid)"
    result = await sandbox.run(Command(["sh", "-c", script], cwd=folder))
    if result.exit_code != 0:
        msg = "the process that records the agent's exit code was killed inside the sandbox"
        raise AgentError(FailureClass.AGENT_FAILED, msg)


def _finished(ended: bytes, job: Job) -> Finished:
    try:
        code, began, end, dropped = ended.split()
        seconds = float(end) - float(began)
        exit_code = int(code)
        dropped_bytes = int(dropped)
    except ValueError as error:
        msg = f"the sandbox's record of the agent's exit is unreadable: {ended[:80]!r}"
        raise AgentError(FailureClass.BAD_RESULT, msg) from error
    timed_out = exit_code in (124, 137) and seconds >= job.timeout_seconds
    return Finished(exit_code, timed_out, seconds, dropped_bytes)
