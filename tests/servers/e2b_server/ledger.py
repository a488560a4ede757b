"""What really happened on the provider: the truth that tests compare the product with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

EntryKind = Literal[
    "request",
    "created",
    "killed",
    "expired",
    "vanished",
    "extended",
    "snapshot",
    "snapshot-deleted",
    "egress",
]
ENDS: tuple[EntryKind, ...] = ("killed", "expired", "vanished")


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        time: seconds of the monotonic clock of this boot.
        request: method and path, for `request` entries, written on arrival; the name, for
            `egress` and snapshot entries.
        headers: of an `egress` entry, as they left the sandbox.
    """

    kind: EntryKind
    time: float
    sandbox_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    idempotency_key: str | None = None
    request: str | None = None
    network: str | None = None
    ttl_seconds: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class Ledger:
    """Append-only; safe to read from other threads.

    Args:
        path: JSONL file that gets a copy of every entry, for other processes.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._entries: list[Entry] = []
        self._lock = threading.Lock()
        self._path = path

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """The ledger that another process wrote."""
        ledger = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            ledger._entries.append(Entry(**json.loads(line)))
        return ledger

    def add(
        self,
        kind: EntryKind,
        *,
        sandbox_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        request: str | None = None,
        network: str | None = None,
        ttl_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Append one entry."""
        with self._lock:
            entry = Entry(
                kind,
                time.monotonic(),
                sandbox_id,
                dict(metadata or {}),
                idempotency_key,
                request,
                network,
                ttl_seconds,
                dict(headers or {}),
            )
            self._entries.append(entry)
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(entry)) + "\n")

    def entries(self, kind: EntryKind | None = None, **metadata: str) -> list[Entry]:
        """All entries, or those of one kind and with these metadata."""
        with self._lock:
            found = list(self._entries)
        return [
            entry
            for entry in found
            if (kind is None or entry.kind == kind)
            and all(entry.metadata.get(key) == value for key, value in metadata.items())
        ]

    def created(self, **metadata: str) -> list[str]:
        """Ids of all sandboxes that were ever created."""
        return [entry.sandbox_id or "" for entry in self.entries("created", **metadata)]

    def live(self, **metadata: str) -> list[str]:
        """Ids of the sandboxes alive now."""
        ended = {entry.sandbox_id for entry in self.entries() if entry.kind in ENDS}
        return [name for name in self.created(**metadata) if name not in ended]

    def snapshots(self) -> list[str]:
        """Names of the snapshots that exist now."""
        deleted = {entry.request for entry in self.entries("snapshot-deleted")}
        taken = [entry.request or "" for entry in self.entries("snapshot")]
        return [name for name in taken if name not in deleted]

    def max_live(self, **metadata: str) -> int:
        """Most sandboxes that were alive at one time."""
        mine = set(self.created(**metadata))
        live = most = 0
        for entry in self.entries():
            if entry.sandbox_id not in mine:
                continue
            if entry.kind == "created":
                live += 1
                most = max(most, live)
            elif entry.kind in ENDS:
                live -= 1
        return most

    def requests(self, method: str, path: str) -> list[Entry]:
        """Requests that arrived, also those that a fault then spoiled."""
        return [entry for entry in self.entries("request") if entry.request == f"{method} {path}"]

    def most_creates_in(self, window_seconds: float) -> int:
        """Most create requests that arrived within any window of this length."""
        times = [entry.time for entry in self.requests("POST", "/v2/sandboxes")]
        most = first = 0
        for last, moment in enumerate(times):
            while moment - times[first] >= window_seconds:
                first += 1
            most = max(most, last - first + 1)
        return most
