"""Counts of a JUnit XML report that a hostile patch may have had a hand in.

Read by expat without any entity, document type or external reference, so that the report can
neither grow while it is read nor reach for a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

MAX_BYTES = 20_000_000
MAX_NAMES = 20
MAX_NAME_CHARS = 200
MAX_DEPTH = 100


class JUnitError(ValueError):
    """The report can't be read; the message says why."""


@dataclass
class Counts:
    """What a report says, counted by its `testcase` elements.

    Attributes:
        names: of the first tests that failed.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    names: list[str] = field(default_factory=list[str])


def read_junit(data: bytes) -> Counts:
    """Count the tests of a report.

    Raises:
        JUnitError: it is no JUnit XML, too large, or uses what could be turned against us.
    """
    if len(data) > MAX_BYTES:
        msg = f"larger than {MAX_BYTES // 1_000_000} MB"
        raise JUnitError(msg)
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError, UnicodeError) as error:
        msg = f"not well-formed XML: {error}"
        raise JUnitError(msg) from error
    if not reader.is_junit:
        msg = "not JUnit XML: its root is neither testsuites nor testsuite"
        raise JUnitError(msg)
    return reader.counts


class _Reader:
    def __init__(self) -> None:
        self.counts = Counts()
        self.is_junit = False
        self._depth = 0
        self._case: str | None = None
        self._result = "passed"

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            msg = f"nested deeper than {MAX_DEPTH} elements"
            raise JUnitError(msg)
        local = name.rpartition("}")[2]
        if self._depth == 1:
            self.is_junit = local in ("testsuites", "testsuite")
        if local == "testcase":
            parts = (attributes.get("classname", ""), attributes.get("name", ""))
            self._case = ".".join(part for part in parts if part)[:MAX_NAME_CHARS]
            self._result = "passed"
        elif self._case is not None and local in ("failure", "error"):
            self._result = "failed"
        elif self._case is not None and local == "skipped" and self._result == "passed":
            self._result = "skipped"

    def end(self, name: str) -> None:
        self._depth -= 1
        if name.rpartition("}")[2] != "testcase" or self._case is None:
            return
        if self._result == "failed":
            self.counts.failed += 1
            if len(self.counts.names) < MAX_NAMES:
                self.counts.names.append(self._case)
        elif self._result == "skipped":
            self.counts.skipped += 1
        else:
            self.counts.passed += 1
        self._case = None


def _refuse(*_: object) -> NoReturn:
    msg = "has a document type or an entity, which is refused"
    raise JUnitError(msg)
