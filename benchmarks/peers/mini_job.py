"""mini-swe-agent: one agent a fork in its own bubblewrap environment, with a scripted model.

Usage: python -m benchmarks.peers.mini_job REPO FORKS WIDTH
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from minisweagent.environments.extra.bubblewrap import BubblewrapEnvironment

from benchmarks.peers.work import clone


def one(repo: str) -> int:
    with clone(repo) as folder:
        environment = BubblewrapEnvironment(cwd=f"{folder}/repo")
        done = [environment.execute({"command": text}) for text in ("true", "git diff HEAD")]
        return sum(item["returncode"] for item in done)


def main() -> None:
    repo, forks, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with ThreadPoolExecutor(width) as pool:
        codes = list(pool.map(one, [repo] * forks))
    if any(codes):
        raise SystemExit(f"not every fork succeeded: {codes}")


if __name__ == "__main__":
    main()
