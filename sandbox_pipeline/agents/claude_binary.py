"""Where Claude Code is on this machine, and whether it is recent enough."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import AgentConfig
from sandbox_pipeline.errors import ConfigError

MIN_VERSION = (2, 1, 197)
"""The oldest version whose options and output this package was tried with."""
HOW_TO_INSTALL = "npm install -g @anthropic-ai/claude-code (or https://claude.com/claude-code)"
VERSION_SECONDS = 20.0
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


def find_claude(config: AgentConfig, environ: Mapping[str, str]) -> Path:
    """The native program of Claude Code.

    Raises:
        ConfigError: there is none, or it is too old.
    """
    binary = native_program(_named(config, environ))
    version = _version(binary, binary.stat().st_mtime_ns)
    check_version(str(binary), version, f"claude update, or {HOW_TO_INSTALL}")
    return binary


def parse_version(said: bytes) -> tuple[int, ...] | None:
    """What `claude --version` said; None where that is no version."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", said.decode("utf-8", "replace"))
    return None if found is None else tuple(map(int, found.groups()))


def check_version(where: str, version: tuple[int, ...], remedy: str) -> None:
    """Refuse a version whose options are not known to protect from a hostile repository.

    Raises:
        ConfigError: naming what was found, what is needed and the remedy.
    """
    if version < MIN_VERSION:
        found, needed = (".".join(map(str, parts)) for parts in (version, MIN_VERSION))
        msg = f"{where}: Claude Code {found} is too old, {needed} or newer is needed: {remedy}"
        raise ConfigError(msg)


def check_claude(config: AgentConfig, environ: Mapping[str, str]) -> Check:
    """What `doctor` says of it."""
    try:
        binary = find_claude(config, environ)
        version = ".".join(map(str, _version(binary, binary.stat().st_mtime_ns)))
    except ConfigError as error:
        return Check("Claude Code", "failed", str(error), HOW_TO_INSTALL)
    return Check("Claude Code", "ok", f"{version} at {binary}")


def _named(config: AgentConfig, environ: Mapping[str, str]) -> Path:
    if config.claude_binary is not None:
        path = Path(config.claude_binary).expanduser()
        if not path.is_file():
            msg = f"agent.claude_binary: {path}: no such file; install with {HOW_TO_INSTALL}"
            raise ConfigError(msg)
        return path
    found = shutil.which("claude", path=environ.get("PATH", os.defpath))
    if found is None:
        remedy = f"install Claude Code with {HOW_TO_INSTALL}, or name it in agent.claude_binary"
        msg = f"claude: not found on the PATH; {remedy}"
        raise ConfigError(msg)
    return Path(found)


def native_program(path: Path) -> Path:
    """The program itself: npm may have put a script or an empty stub in its place."""
    real = path.resolve()
    if _is_program(real):
        return real
    names = [f"claude-code-linux-{_MACHINES.get(platform.machine().lower(), 'x64')}"]
    names.append(f"{names[0]}-musl")
    for folder in real.parents:
        for name in names:
            for scope in (folder, folder / "node_modules" / "@anthropic-ai"):
                candidate = scope / name / "claude"
                if _is_program(candidate):
                    return candidate.resolve()
        if folder.name == "node_modules":
            break
    problem = "this is not Claude Code's native program, and none is beside it"
    msg = f"{path}: {problem}; install again with {HOW_TO_INSTALL}"
    raise ConfigError(msg)


def _is_program(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


@functools.lru_cache(maxsize=8)
def _version(binary: Path, modified_ns: int) -> tuple[int, ...]:
    try:
        done = subprocess.run(
            [binary, "--version"],
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"{binary}: can't be run: {error}"
        raise ConfigError(msg) from error
    version = parse_version(done.stdout)
    if version is None:
        msg = f"{binary}: --version gave no version; install Claude Code with {HOW_TO_INSTALL}"
        raise ConfigError(msg)
    return version
