"""The tools that a model on this machine uses inside a sandbox: a shell and a text editor.

Names and inputs are those of Anthropic's `bash_20250124` and `text_editor_20250728`, which the
models are trained on. Whatever is wrong with an input or a file becomes the tool's answer.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox_pipeline.agents.usage import as_list
from sandbox_pipeline.sandboxes.base import WORKSPACE, Command, CommandResult, Sandbox

BASH_SECONDS = 900.0
MAX_ANSWER_CHARACTERS = 30_000
MAX_OUTPUT_BYTES = 4_000_000
MAX_FILE_BYTES = 10_000_000
TOOLS: Sequence[Mapping[str, Any]] = (
    {"type": "bash_20250124", "name": "bash"},
    {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
)

# The shell of one command ends with it, so folder and exported variables are handed to the next.
_SHELL = """\
folder=$1
cd -- "$(cat "$folder/cwd" 2>/dev/null || echo "$2")" 2>/dev/null || cd -- "$2" || exit 1
[ -f "$folder/variables" ] && . "$folder/variables" 2>/dev/null
trap 'pwd > "$folder/cwd"; export -p > "$folder/variables"' EXIT
eval "$3"
"""
_LIST = 'find "$1" -maxdepth 2 -not -path "*/.*" | sort | head -n 1000'
_WRITE = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1"'


@dataclass(frozen=True)
class ToolAnswer:
    """What the model is told."""

    text: str
    is_error: bool = False


class _WrongUseError(Exception):
    """The model used a tool wrongly; the message tells it how."""


class SandboxTools:
    """Runs tools in one sandbox.

    Args:
        sandbox: where they work.
        folder: inside the sandbox, for what one command leaves to the next; exists.
    """

    def __init__(self, sandbox: Sandbox, folder: str) -> None:
        self._sandbox = sandbox
        self._folder = folder

    async def use(
        self, name: str, tool_input: Mapping[str, Any], *, timeout_seconds: float
    ) -> ToolAnswer:
        """Run one tool.

        Raises:
            ProviderError: the sandbox failed.
        """
        try:
            if name == "bash":
                return await self._bash(tool_input, min(timeout_seconds, BASH_SECONDS))
            if name == "str_replace_based_edit_tool":
                return ToolAnswer(_bounded(await self._edit(tool_input)))
        except _WrongUseError as error:
            return ToolAnswer(str(error), is_error=True)
        return ToolAnswer(f"there is no tool {name[:100]!r}", is_error=True)

    async def _bash(self, tool_input: Mapping[str, Any], timeout_seconds: float) -> ToolAnswer:
        if tool_input.get("restart") is True:
            await self._run(["rm", "-f", f"{self._folder}/cwd", f"{self._folder}/variables"])
            return ToolAnswer("the shell starts anew")
        command = _text(tool_input, "command")
        argv = ["bash", "-c", f"exec 2>&1\n{_SHELL}", "bash", self._folder, WORKSPACE, command]
        result = await self._sandbox.run(
            Command(
                argv,
                cwd=WORKSPACE,
                timeout_seconds=timeout_seconds,
                max_output_bytes=MAX_OUTPUT_BYTES,
            )
        )
        parts = [_bounded(_decoded(result.stdout + result.stderr))]
        if result.truncated:
            parts.append("[further output was dropped]")
        if result.timed_out:
            parts.append(f"[killed after {timeout_seconds:.0f} seconds]")
        elif result.exit_code != 0:
            parts.append(f"[exit code {result.exit_code}]")
        text = "\n".join(filter(None, parts)) or "[no output]"
        return ToolAnswer(text, is_error=result.exit_code != 0)

    async def _edit(self, tool_input: Mapping[str, Any]) -> str:
        command = _text(tool_input, "command")
        path = posixpath.normpath(posixpath.join(WORKSPACE, _text(tool_input, "path")))
        if command == "view":
            return await self._view(path, tool_input)
        if command == "create":
            await self._write(path, _text(tool_input, "file_text"))
            return f"{path} is written"
        if command == "str_replace":
            return await self._replace(path, tool_input)
        if command == "insert":
            return await self._insert(path, tool_input)
        msg = f"there is no command {command[:100]!r}; there are view, create, str_replace, insert"
        raise _WrongUseError(msg)

    async def _view(self, path: str, tool_input: Mapping[str, Any]) -> str:
        listed = await self._run(["sh", "-c", f'test -d "$1" && {_LIST}', "sh", path])
        if listed.exit_code == 0:
            return _decoded(listed.stdout)
        lines = (await self._read(path)).split("\n")
        first, last = 1, len(lines)
        view_range = as_list(tool_input.get("view_range"))
        if view_range:
            if len(view_range) != 2 or not all(type(bound) is int for bound in view_range):
                msg = "view_range must be [first line, last line]; -1 is the end"
                raise _WrongUseError(msg)
            first = max(1, view_range[0])
            last = len(lines) if view_range[1] == -1 else min(view_range[1], len(lines))
        numbered = [f"{number}\t{lines[number - 1]}" for number in range(first, last + 1)]
        return "\n".join(numbered) or "[empty]"

    async def _replace(self, path: str, tool_input: Mapping[str, Any]) -> str:
        old = _text(tool_input, "old_str")
        new = _text(tool_input, "new_str", default="")
        text = await self._read(path)
        count = text.count(old) if old else 0
        if count != 1:
            msg = f"old_str must be in {path} exactly once; it is there {count} times"
            raise _WrongUseError(msg)
        await self._write(path, text.replace(old, new))
        return f"{path} is edited"

    async def _insert(self, path: str, tool_input: Mapping[str, Any]) -> str:
        name = "insert_text" if "insert_text" in tool_input else "new_str"
        inserted = _text(tool_input, name)
        after = tool_input.get("insert_line")
        lines = (await self._read(path)).splitlines(keepends=True)
        if type(after) is not int or not 0 <= after <= len(lines):
            msg = f"insert_line must be a whole number from 0 to {len(lines)}"
            raise _WrongUseError(msg)
        if not inserted.endswith("\n"):
            inserted += "\n"
        if after and not lines[after - 1].endswith("\n"):
            lines[after - 1] += "\n"
        await self._write(path, "".join([*lines[:after], inserted, *lines[after:]]))
        return f"{path} is edited"

    async def _read(self, path: str) -> str:
        try:
            data = await self._sandbox.read(path, max_bytes=MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            msg = f"{path}: there is no such file"
            raise _WrongUseError(msg) from None
        if len(data) > MAX_FILE_BYTES:
            msg = f"{path} is larger than {MAX_FILE_BYTES} bytes; use bash"
            raise _WrongUseError(msg)
        return data.decode("utf-8", "surrogateescape")

    async def _write(self, path: str, text: str) -> None:
        # Not `Sandbox.write`, which makes a new file: the mode of this one stays, and a link too.
        data = text.encode("utf-8", "surrogateescape")
        result = await self._run(["sh", "-c", _WRITE, "sh", path], data)
        if result.exit_code != 0:
            msg = f"{path} can't be written: {_decoded(result.stderr)[:500]}"
            raise _WrongUseError(msg)

    async def _run(self, argv: Sequence[str], stdin: bytes = b"") -> CommandResult:
        return await self._sandbox.run(Command(argv, cwd=WORKSPACE, stdin=stdin))


def _text(tool_input: Mapping[str, Any], name: str, *, default: str | None = None) -> str:
    value = tool_input.get(name, default)
    if not isinstance(value, str) or (name in {"path", "command"} and "\0" in value):
        msg = f"{name} must be a text"
        raise _WrongUseError(msg)
    return value.encode("utf-8", "replace").decode()


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _bounded(text: str) -> str:
    if len(text) <= MAX_ANSWER_CHARACTERS:
        return text.encode("utf-8", "replace").decode()
    half = MAX_ANSWER_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return _bounded(
        f"{text[: half - 30]}\n[… {left_out} characters left out …]\n{text[-half + 30 :]}"
    )
