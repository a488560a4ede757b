"""What E2B charges for a running sandbox, dated; a variable replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sandbox_pipeline.errors import ConfigError

PRICES_AS_OF = "2026-11-23"
PRICES_SOURCE = "https://e2b.dev/pricing"
PRICES_VARIABLE = "SANDBOX_PIPELINE_E2B_PRICES"


@dataclass(frozen=True)
class SandboxPrices:
    """US dollars per second of a running sandbox."""

    cpu: float = 0.000014
    memory_gib: float = 0.0000045

    def usd_per_second(self, *, cpu_count: float, memory_mib: float) -> float:
        """Of one sandbox of this size."""
        return cpu_count * self.cpu + memory_mib / 1024 * self.memory_gib


def prices_from_environ(environ: Mapping[str, str]) -> SandboxPrices:
    """The prices, with those of `PRICES_VARIABLE` in their place: `CPU MEMORY`.

    Raises:
        ConfigError: the variable doesn't hold two amounts.
    """
    text = environ.get(PRICES_VARIABLE, "").strip()
    if not text:
        return SandboxPrices()
    try:
        cpu, memory = (float(word) for word in text.split())
    except ValueError:
        cpu = memory = -1.0
    if not (0 <= cpu < 1 and 0 <= memory < 1):
        msg = (
            f"{PRICES_VARIABLE}: {text[:100]!r} is not two amounts below 1: US dollars for a "
            "second of one CPU and of one GiB, such as '0.000014 0.0000045'"
        )
        raise ConfigError(msg)
    return SandboxPrices(cpu, memory)
