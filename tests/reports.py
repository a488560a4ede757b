"""Orchestrations as they are stored, with forks of any number, without running any."""

from __future__ import annotations

import json
from pathlib import Path

from sandbox_pipeline.clock import Instant
from sandbox_pipeline.config import parse_config
from sandbox_pipeline.records import (
    AgentResult,
    Fork,
    Orchestration,
    Outcome,
    Patch,
    Stage,
    Timings,
    Usage,
    Verdict,
    Verification,
)


def at(seconds: float) -> Instant:
    return Instant(wall=1_790_000_000 + seconds, monotonic=seconds, boot="b")


def orchestration(folder: Path, num_forks: int, prompt: str = "Fix it") -> Orchestration:
    config = parse_config(
        {
            "workflow_id": "sample",
            "repo_url": "https://example.invalid/shop.git",
            "prompt": prompt,
            "num_forks": num_forks,
            "model": "sonnet",
            "verify_command": "pytest -q",
            "verify_protect": ["tests/**"],
            "agent": {"command": "agent {prompt_file}"},
        }
    )
    return Orchestration(
        workflow_id="sample",
        config=config,
        provider="local",
        network="none",
        artifacts=str(folder),
        base_commit="1aef868e43" + "0" * 30,
        branch="main",
        complete=True,
        requested_at=at(0),
        completed_at=at(60.0 * num_forks / 5),
    )


def fork(folder: Path, number: int, *, patch: str | None = None, text: str = "") -> Fork:
    """A fork with files; every third is verified, every third rejected, every third has none."""
    place = folder / f"fork_{number:03d}"
    place.mkdir(parents=True, exist_ok=True)
    diff = patch if patch is not None else sample_patch(number)
    (place / "patch.diff").write_text(diff, encoding="utf-8")
    entries = [
        {"time": 1.0, "type": "prompt", "text": "Fix it"},
        {"time": 2.0, "type": "tool_use", "name": "Bash", "input": {"command": "pytest -q"}},
        {"time": 3.0, "type": "tool_result", "text": text or "1 failed\n" * 20, "is_error": True},
        {"time": 4.0, "type": "text", "text": text or f"I changed shop/cart.py ({number})."},
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (place / "transcript.jsonl").write_text(lines, encoding="utf-8")
    log = place / "verification.log"
    log.write_text(text or "....F\n5 tests\n", encoding="utf-8")
    verdict = (Verdict.VERIFIED, Verdict.REJECTED, Verdict.UNVERIFIED)[number % 3]
    reasons = ("5 tests passed", "1 of 5 tests failed: tests.test_cart.test_total", "no test ran")
    ok = number % 3 != 1
    begin = 12.0 * (number // 5)
    return Fork(
        workflow_id="sample",
        fork_num=number,
        outcome=Outcome.SUCCESS if ok else Outcome.FAILED,
        message=text or ("done" if ok else "a test still fails"),
        stage=Stage.DONE,
        timings=Timings(
            queue_seconds=begin + 0.1, create_seconds=0.8, health_seconds=0.2,
            agent_seconds=6 + number % 7, cleanup_seconds=0.3, sandbox_seconds=9.0,
        ),
        result=AgentResult(
            outcome=Outcome.SUCCESS,
            turns=5 + number % 4,
            usage=Usage(
                input_tokens=1200, output_tokens=800 + 37 * (number % 11),
                cache_creation_input_tokens=9000, cache_read_input_tokens=150_000,
                cost_usd=None if number % 7 == 6 else 0.05 + 0.013 * (number % 9),
            ),
        ),
        patch=Patch(
            files_changed=1, insertions=3 + number % 5, deletions=1, size_bytes=len(diff),
            path=str(place / "patch.diff"),
        ),
        verification=Verification(
            outcome=verdict, reason=text or reasons[number % 3], seconds=2.0, exit_code=0,
            tests_passed=5 if ok else 4, log_path=str(log),
        ),
        queued_at=at(0.1),
        started_at=at(begin + 0.2),
        ended_at=at(begin + 12),
        total_seconds=11.0,
    )  # fmt: skip


def sample_patch(number: int, lines: int = 12) -> str:
    added = "".join(f"+    total += price[{n + number}] * count\n" for n in range(lines))
    return (
        "diff --git a/shop/cart.py b/shop/cart.py\nindex 1111111..2222222 100644\n"
        "--- a/shop/cart.py\n+++ b/shop/cart.py\n@@ -1,4 +1,16 @@ def total(cart):\n"
        f" def total(cart):\n     total = 0\n-    return 0\n{added}+    return total\n"
    )
