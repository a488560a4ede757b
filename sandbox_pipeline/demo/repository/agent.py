"""A stand-in for a coding agent: three different tries at the task, one for each fork.

Usage: python3 agent.py PROMPT_FILE FORK_NUM

Fork 0 solves the task, fork 1 makes a wrong change and says so (exit code 1), fork 2 crashes
half-way (SIGABRT). The outcome is that of the tests, which it really runs.
"""

import os
import pathlib
import subprocess
import sys
import time

SOURCE = pathlib.Path("slugs.py")

SOLUTION = '''"""Names for URLs."""

import re


def slugify(title: str) -> str:
    """Turn a title into lower-case words joined by single dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))
'''

WRONG = '''"""Names for URLs."""


def slugify(title: str) -> str:
    """Turn a title into lower-case words joined by single dashes."""
    return "-".join(title.lower().split())
'''

HALF = '''"""Names for URLs."""

import re

def slugify(title: str) -> str:
'''


def main() -> int:
    prompt = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
    strategy = int(sys.argv[2]) % 3
    print(f"task: {prompt.strip().splitlines()[0]}", flush=True)
    time.sleep(0.5)
    print(f"editing {SOURCE} (strategy {strategy})", flush=True)
    SOURCE.write_text((SOLUTION, WRONG, HALF)[strategy], encoding="utf-8")
    time.sleep(0.5)
    if strategy == 2:
        print("crashing half-way", flush=True)
        os.abort()
    print("running the tests", flush=True)
    tests = subprocess.run(
        [sys.executable, "-B", "-m", "unittest", "--quiet"], stderr=subprocess.STDOUT, check=False
    )
    print("all tests pass" if tests.returncode == 0 else "a test still fails", flush=True)
    return 0 if tests.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
