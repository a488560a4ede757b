"""What the tests of the model agents share: the Claude Code of the tests, and what it costs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sandbox_pipeline.agents.models import PRICES, Tokens
from tests.servers.messages_server import LedgerEntry

NPM_FOLDERS = ("/opt/claude-code", "~/.cache/sandbox_pipeline/claude-code")
"""Where `.ci/install-claude` puts it."""


def find_test_claude() -> str | None:
    """The Claude Code that the tests use; an old one counts with the prices of its time."""
    named = os.environ.get("SANDBOX_PIPELINE_TEST_CLAUDE")
    if named:
        return named
    for folder in (os.environ.get("CLAUDE_CODE_TEST_DIR"), *NPM_FOLDERS):
        program = Path(folder or "/nowhere").expanduser() / "node_modules/.bin/claude"
        if program.exists():
            return str(program)
    return shutil.which("claude")


def cost(entries: list[LedgerEntry]) -> float:
    """What the server charged, by our prices."""
    total = 0.0
    for entry in entries:
        if entry.charge is not None:
            charge = entry.charge
            tokens = Tokens(
                charge.input_tokens,
                charge.output_tokens,
                charge.cache_creation_input_tokens,
                charge.cache_read_input_tokens,
            )
            total += PRICES[entry.model].cost_usd(tokens)
    return total
