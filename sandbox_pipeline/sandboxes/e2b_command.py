"""A command's whole life inside an E2B sandbox, in one round trip.

E2B runs text in a login shell and returns text when nobody holds its output open any more. The
script here runs an argument list in its own session, keeps the first bytes of each stream, ends
the session at the deadline, returns while background processes live on, and answers in base64.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import shlex
from dataclasses import dataclass, field

from sandbox_pipeline.sandboxes.base import Command, CommandResult

JOB_VARIABLE = "SANDBOX_PIPELINE_JOB"
MAX_INLINE_BYTES = 64_000
"""A longer job goes by file: Linux takes at most 128 KiB in one environment variable."""
NOT_EXECUTABLE = 126
TIMED_OUT = 124

LAUNCH = f'eval "${JOB_VARIABLE}"'
"""The command line; all else is in the variable, out of the sight of `ps`."""

# Needs bash, coreutils and setsid of util-linux, which every Debian has. Sleeps are `read -t` on
# a pipe that nobody writes to, which starts no process that could be left over.
#
# The sinks outlive the script when a background process holds the output open, so that it is not
# ended by SIGPIPE. A sink's first `cat` keeps what fits under its file size limit, which ends it;
# `head` would hold back small output, and `dd` counts short reads as whole blocks. That it has
# kept all that the command wrote is known without an end of file: it sleeps and the pipe is empty.
#
# It cleans up without a trap, since a forked subshell that is killed at once would run that too.
#
# Exit 70 and 71: no room for the script's own files.
SCRIPT = r"""
_sp=$(mktemp -d /tmp/.sandbox-pipeline.XXXXXX) || exit 70

finish() {
  rm -rf -- "$_sp" "${_sp_files[@]}"
  exit "$1"
}
sink() {
  exec 3<"$_sp/$1"
  ulimit -c 0
  ulimit -f "$(((_sp_keep + 1023) / 1024))"
  cat <&3 >"$_sp/$1.kept" &
  echo "$!" >"$_sp/$1.pid"
  wait "$!"
  echo "$?" >"$_sp/$1.status"
  exec cat <&3
}
get() {
  local round
  _sp_got=
  for ((round = 0; round < 1000; round++)); do
    read -r _sp_got <"$_sp/$1" && return
    read -r -t 0.005 -u "$_sp_nap"
  done
  return 1
}
state_of() {
  local line=
  read -r -d '' line <"/proc/$1/stat"
  line=${line##*) }
  set -- $line
  _sp_state=${1:-gone} _sp_session=${4:-}
}
end_session() {
  local round stat pid left
  get sid || return
  for ((round = 0; round < 500; round++)); do
    left=
    for stat in /proc/[0-9]*/stat; do
      pid=${stat#/proc/} pid=${pid%/stat}
      state_of "$pid"
      [[ $_sp_session == "$_sp_got" || $pid == "$_sp_got" ]] || continue
      [[ $_sp_state == [ZXg]* ]] || { kill -KILL "$pid"; left=1; }
    done
    [[ $left ]] || return
    read -r -t 0.01 -u "$_sp_nap"
  done
}
watch() {
  read -r -t "$_sp_seconds" -u "$_sp_nap"
  : >"$_sp/late"
  end_session
}
settle() {
  get "$1.pid" || return
  while state_of "$_sp_got"; [[ $_sp_state != [ZXg]* ]]; do
    [[ $_sp_state == S ]] && ! read -t 0 -u "$2" && return 0
    read -r -t 0.002 -u "$_sp_nap"
  done
  get "$1.status" || return
  [[ $_sp_got == 0 ]] || (($(stat -c %s -- "$_sp/$1.kept") >= _sp_keep))
}

mkfifo -- "$_sp/out" "$_sp/err" "$_sp/nap" || finish 70
_sp_setsid=$(type -P setsid) || finish 70
sink out </dev/null >/dev/null &
sink err </dev/null >/dev/null &
exec {_sp_out}>"$_sp/out" {_sp_err}>"$_sp/err"
exec {_sp_out_read}<"$_sp/out" {_sp_err_read}<"$_sp/err" {_sp_nap}<>"$_sp/nap"
watch </dev/null >/dev/null {_sp_out}>&- {_sp_err}>&- &
_sp_watch=$!
(
  echo "$BASHPID" >"$_sp/sid" || kill "$$"
  cd -- "$_sp_cwd" 2>&"$_sp_err" || exit 127
  _sp_env
  exec "$_sp_setsid" -- "${_sp_argv[@]}" <"$_sp_stdin" >&"$_sp_out" 2>&"$_sp_err" \
    {_sp_out}>&- {_sp_err}>&- {_sp_out_read}<&- {_sp_err_read}<&- {_sp_nap}<&-
)
_sp_code=$?
exec {_sp_out}>&- {_sp_err}>&-
_sp_late=0
if [[ -e $_sp/late ]]; then wait "$_sp_watch"; _sp_late=1; else kill "$_sp_watch"; fi
settle out "$_sp_out_read" && settle err "$_sp_err_read" || finish 71
printf '\n%s %s %s\n' "$_sp_token" "$_sp_code" "$_sp_late"
head -c "$_sp_keep" -- "$_sp/out.kept" | base64 -w0
printf '\n'
head -c "$_sp_keep" -- "$_sp/err.kept" | base64 -w0
printf '\n%s\n' "$_sp_token"
finish 0
"""


class UnreadableAnswerError(ValueError):
    """The script's answer is not what it prints: its shell or its sandbox was tampered with."""


@dataclass(frozen=True)
class Job:
    """One command, ready to be sent.

    Attributes:
        variable: value of `JOB_VARIABLE`, the whole script.
        uploads: files to put into the sandbox first; the script removes them.
    """

    token: str
    variable: str
    max_output_bytes: int
    uploads: dict[str, bytes] = field(default_factory=dict[str, bytes])


def prepare(command: Command) -> Job:
    """Word a command for the script.

    Raises:
        ValueError: there is no such command line, since it has a NUL byte or no word.
    """
    words = (*command.argv, command.cwd, *command.env, *command.env.values())
    if not command.argv or any("\0" in word for word in words):
        msg = "embedded null byte" if command.argv else "no command"
        raise ValueError(msg)
    token = f"sandbox-pipeline-{secrets.token_hex(8)}"
    path = f"/tmp/.{token}"  # noqa: S108 - in the sandbox, and the name can't be guessed
    uploads: dict[str, bytes] = {}
    stdin = "/dev/null"
    if command.stdin:
        stdin = f"{path}.stdin"
        uploads[stdin] = command.stdin
    exports = "; ".join(f"export {name}={shlex.quote(it)}" for name, it in command.env.items())
    lines = [
        f"_sp_argv=({shlex.join(command.argv)})",
        f"_sp_cwd={shlex.quote(command.cwd)}",
        f"_sp_env() {{ {exports or ':'}; }}",
    ]
    body = "\n".join(lines)
    encoded = body.encode("utf-8", "surrogateescape")
    if len(encoded) > MAX_INLINE_BYTES or not _is_text(body):
        uploads[f"{path}.job"] = encoded
        body = f". {path}.job"
    head = [
        "exec 2>/dev/null",
        f"unset {JOB_VARIABLE}",
        f"_sp_token={token}",
        f"_sp_keep={command.max_output_bytes + 1}",
        f"_sp_seconds={max(0.001, command.timeout_seconds):.3f}",
        f"_sp_stdin={stdin}",
        f"_sp_files=({' '.join(uploads)})",
    ]
    return Job(token, "\n".join([*head, body, SCRIPT]), command.max_output_bytes, uploads)


def result(job: Job, answer: str) -> CommandResult:
    """Read what the script printed.

    Raises:
        UnreadableAnswerError: it is not complete, or something else.
    """
    # Whatever the login shell's own profile prints comes before.
    _, start, rest = answer.partition(f"\n{job.token} ")
    lines = rest.split("\n")
    if not start or len(lines) < 4 or lines[3] != job.token:
        msg = f"the sandbox's shell answered {len(answer)} characters of something else"
        raise UnreadableAnswerError(msg)
    try:
        code, late = (int(word) for word in lines[0].split(" "))
        stdout, stderr = (base64.b64decode(line, validate=True) for line in lines[1:3])
    except (ValueError, binascii.Error) as error:
        msg = f"the sandbox's shell answered something else: {error}"
        raise UnreadableAnswerError(msg) from error
    most = job.max_output_bytes
    return CommandResult(
        exit_code=TIMED_OUT if late else code,
        stdout=stdout[:most],
        stderr=stderr[:most],
        timed_out=bool(late),
        truncated=len(stdout) > most or len(stderr) > most,
    )


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
