"""Transcripts of all agents, as people read them."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from sandbox_pipeline.agents.transcript import Entry
from sandbox_pipeline.cli.transcript import MAX_LINES, print_transcript
from tests.real_runs import wire


def shown(*entries: Entry) -> str:
    out = io.StringIO()
    print_transcript(entries, Console(file=out, width=100))
    return out.getvalue()


def test_each_kind_of_entry_is_told_in_words() -> None:
    text = shown(
        Entry(time=10, type="prompt", text="Fix it.\nPlease."),
        Entry(time=11, type="text", text="Looking."),
        Entry(time=12, type="tool_use", name="Bash", input={"command": "ls\npwd"}),
        Entry(time=13, type="tool_result", text="\n".join(map(str, range(100)))),
        Entry(time=14, type="tool_use", name="Edit", input={"path": "a.py", "new": "x\ny"}),
        Entry(time=15, type="tool_result", text="no such file", is_error=True),
        Entry(time=16, type="output", name="stdout", text="one"),
        Entry(time=17, type="output", name="stdout", text="two \x1b[2J[bold]"),
        Entry(time=18, type="result", text="Done.", data={"exit_code": 0}),
    )
    assert "[     0.0 s] prompt\n    Fix it.\n    Please.\n" in text
    assert "[     2.0 s] uses Bash\n    $ ls\n        pwd\n" in text
    assert f"    {MAX_LINES - 1}\n    … {100 - MAX_LINES} more lines; all with --json\n" in text
    assert "uses Edit\n    path: a.py\n    new:\n        x\n        y\n" in text
    assert "is told of an error\n    no such file\n" in text
    assert text.count("] stdout") == 1
    assert "\x1b" not in text
    assert "[bold]" in text
    assert '{"exit_code": 0}' in text


def test_no_entries_are_no_error() -> None:
    assert shown() == ""


async def test_show_of_a_real_run(home: Path, tmp_path: Path) -> None:
    async with wire(tmp_path, "local", "anthropic") as servers:
        code, result = await servers.run(*servers.arguments("anthropic", forks=2))
        assert code == 0, result
        code, out, _ = await servers.cli("show", "--fork", "1")
        assert code == 0
        for words in ("Edit app.py.", "uses bash", "$ echo this is", "this is fork-1", "Done in"):
            assert words in out
