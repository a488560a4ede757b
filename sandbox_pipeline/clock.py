"""Instants that survive a process: wall time to show, monotonic time to subtract."""

from __future__ import annotations

import functools
import time
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Instant(BaseModel):
    """One moment.

    Attributes:
        wall: seconds since 1970-01-01 UTC; may jump when the clock is set.
        monotonic: seconds of this boot's monotonic clock; the same for all its processes.
        boot: which boot of which machine `monotonic` belongs to; empty where unknown.
    """

    model_config = ConfigDict(frozen=True)

    wall: float
    monotonic: float
    boot: str

    def seconds_since(self, earlier: Instant) -> float:
        """Seconds from `earlier` to this; by the monotonic clock within one boot, else by wall."""
        if self.boot and self.boot == earlier.boot:
            return max(0.0, self.monotonic - earlier.monotonic)
        return max(0.0, self.wall - earlier.wall)

    @property
    def at(self) -> datetime:
        """The wall time as an aware UTC datetime."""
        return datetime.fromtimestamp(self.wall, UTC)


def now() -> Instant:
    """The present moment on this machine."""
    return Instant(wall=time.time(), monotonic=time.monotonic(), boot=boot_id())


@functools.cache
def boot_id() -> str:
    """What identifies this boot of this machine; empty where the system doesn't tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
