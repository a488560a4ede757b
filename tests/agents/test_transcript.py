"""Transcripts: what is written is what is read, bounded, as it comes."""

from pathlib import Path

import pytest

from sandbox_pipeline.agents import transcript as module
from sandbox_pipeline.agents.transcript import TranscriptWriter, read_transcript
from sandbox_pipeline.redaction import Redactor


def test_entries_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    with TranscriptWriter(path, Redactor(["s3cret-value"])) as transcript:
        transcript.add("text", "half a pair \ud800, gr\u00fcn, s3cret-value")
        transcript.add("tool_use", name="Bash", tool_use_id="1", input={"a": None, "b": [1.5]})
        transcript.add("tool_result", "no", is_error=True, name=None)
    text, use, result = read_transcript(path)
    assert (text.type, text.name) == ("text", None)
    assert text.text.startswith("half a pair ?, gr\u00fcn, ")
    assert transcript.leaked
    assert b"s3cret" not in path.read_bytes()
    assert (use.name, use.tool_use_id, use.input) == ("Bash", "1", {"a": None, "b": [1.5]})
    assert (result.text, result.is_error) == ("no", True)
    assert text.time <= use.time <= result.time


def test_an_entry_can_be_read_at_once_and_many_that_come_at_once_after_the_last(
    tmp_path: Path,
) -> None:
    path = tmp_path / "transcript.jsonl"
    with TranscriptWriter(path, Redactor([])) as transcript:
        transcript.add("prompt", "one")
        assert len(read_transcript(path)) == 1
        with transcript.many():
            transcript.add("output", "two", name="stdout")
            transcript.add("output", "three", name="stdout")
        assert [it.text for it in read_transcript(path)] == ["one", "two", "three"]
        transcript.add("output", "four", name="stdout")
        assert len(read_transcript(path)) == 4


def test_a_full_transcript_says_so_and_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TRANSCRIPT_BYTES", 200)
    path = tmp_path / "transcript.jsonl"
    with TranscriptWriter(path, Redactor([])) as transcript:
        for number in range(10):
            transcript.add("output", f"line {number}", name="stdout")
    *lines, last = read_transcript(path)
    assert transcript.truncated
    assert 0 < len(lines) < 10
    assert (last.type, last.text) == ("system", "transcript is full; the rest is in the logs")
