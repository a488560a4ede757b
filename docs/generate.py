"""Writes what the docs say of configuration, environment, metrics and exit codes from the code.

Usage: python docs/generate.py [--check]

With --check nothing is written, and the exit code is 1 when a file is not what the code says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sandbox_pipeline.cli.exit_codes import EXIT_CODES
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.metrics import dtypes
from sandbox_pipeline.settings import VARIABLES
from sandbox_pipeline.store import tables

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- begin generated {} -->", "<!-- end generated {} -->"


def main() -> int:
    """Write or check all files."""
    check = "--check" in sys.argv[1:]
    wrong: list[str] = []
    for path, text in outputs():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            wrong.append(str(path.relative_to(ROOT)))
        else:
            path.write_text(text, encoding="utf-8")
    for name in wrong:
        sys.stderr.write(f"{name} is not what the code says; run: python docs/generate.py\n")
    return 1 if wrong else 0


def outputs() -> Iterator[tuple[Path, str]]:
    """Each generated file with its text."""
    yield ROOT / "docs" / "configuration.md", configuration()
    yield ROOT / ".env.example", env_example()
    readme = ROOT / "README.md"
    yield readme, replaced(readme.read_text(encoding="utf-8"), "environment", environment())


def configuration() -> str:
    """The reference page."""
    parts = [
        "# Configuration reference",
        "Generated from the code by `python docs/generate.py`; `make check` checks it.",
        "The same fields are used in the launchpad, in YAML files, in `build_orchestration` and on "
        "the command line (`--set section.field=value`).",
        *sections(OrchestrationConfig, ""),
        "## Files in the orchestrations folder",
        "Such a file has two more fields: `cron` (a cron expression; none: no schedule) and "
        "`timezone` (such as `Europe/Paris`; default `UTC`).",
        "## Environment",
        environment(),
        "## Columns of `fork_metrics`",
        columns(tables.fork_metrics),
        "## Columns of `orchestration_summary`",
        columns(tables.orchestration_summary),
        "## Exit codes",
        table(["code", "meaning"], [[str(code), text] for code, text in EXIT_CODES.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A heading and a table for a section, then those of its inner sections."""
    yield f"## `{prefix.rstrip('.')}`" if prefix else "## Top level"
    yield " ".join((model.__doc__ or "").split())
    rows: list[list[str]] = []
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            inner.append((annotation, f"{prefix}{name}."))
            continue
        rows.append(
            [
                f"`{prefix}{name}`",
                kind(field),
                default(field),
                bounds(field),
                field.description or "",
            ]
        )
    yield table(["field", "type", "default", "bounds", "meaning"], rows)
    for section, path in inner:
        yield from sections(section, path)


def kind(field: FieldInfo) -> str:
    """The type in words."""
    annotation: Any = field.annotation
    options = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is not None and len(options) == 1:
        annotation = options[0]
    return str(getattr(annotation, "__name__", annotation)).replace("|", "\\|")


def default(field: FieldInfo) -> str:
    """The default, or that there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ({}, []) else f"`{value}`"


def bounds(field: FieldInfo) -> str:
    """The limits that the model itself checks."""
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found: list[str] = []
    for item in field.metadata:
        for name, word in words.items():
            value = getattr(item, name, None)
            if value is not None:
                found.append(f"{word} {value:g}")
        pattern = getattr(item, "pattern", None)
        if pattern is not None:
            found.append(f"`{pattern}`".replace("|", "\\|"))
    return ", ".join(found)


def environment() -> str:
    """The table of environment variables."""
    return table(
        ["variable", "default", "meaning"],
        [
            [f"`{name}`", f"`{value}`" if value else "", text]
            for name, (value, text) in VARIABLES.items()
        ],
    )


def columns(chosen: Any) -> str:
    """The table of a metrics table's columns."""
    types = dtypes(chosen)
    return table(
        ["column", "dtype", "meaning"],
        [
            [f"`{column.name}`", types[column.name], column.comment or ""]
            for column in chosen.columns
        ],
    )


def env_example() -> str:
    """The file to copy to `.env`."""
    lines = [
        "# Every variable is optional. Copy to .env, which `sandbox-pipeline ui` reads from the",
        "# current folder; for the other commands: set -a; . ./.env; set +a",
        "",
    ]
    for name, (value, text) in VARIABLES.items():
        lines += [f"# {text}", f"# {name}={value}", ""]
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replaced(text: str, name: str, content: str) -> str:
    """The text with what is between two markers replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        msg = f"README.md has no markers {begin} … {end}"
        raise SystemExit(msg)
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


if __name__ == "__main__":
    sys.exit(main())
