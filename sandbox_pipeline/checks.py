"""One finding of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what would help.

    Attributes:
        state: `failed` means that the configuration can't run.
        finding: one line; never a secret's value.
        remedy: one line, empty where all is well.
    """

    name: str
    state: State
    finding: str
    remedy: str = ""
