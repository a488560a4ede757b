"""JUnit reports, also those of a patch that means harm."""

from __future__ import annotations

import pytest

from sandbox_pipeline.junit import JUnitError, read_junit

REPORT = b"""<?xml version="1.0"?><testsuites><testsuite tests="99" failures="0">
<testcase classname="a.B" name="one"/>
<testcase classname="a.B" name="two"><failure>no</failure></testcase>
<testcase name="three"><error/></testcase>
<testcase name="four"><skipped/></testcase>
</testsuite></testsuites>"""


def test_the_tests_themselves_are_counted_not_what_the_suite_claims() -> None:
    counts = read_junit(REPORT)
    assert (counts.passed, counts.failed, counts.skipped) == (1, 2, 1)
    assert counts.names == ["a.B.two", "three"]


BOMB = b"""<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;">
]><testsuite><testcase name="&b;"/></testsuite>"""
EXTERNAL = b"""<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><testsuite>&f;</testsuite>"""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not well-formed"),
        (b"PASSED 3", "not well-formed"),
        (b"<testsuite><testcase>", "not well-formed"),
        (b"<html/>", "not JUnit XML"),
        (BOMB, "document type or an entity"),
        (EXTERNAL, "document type or an entity"),
        (b"<testsuite>" * 101, "nested deeper"),
        (b"<testsuite>" + b" " * 50_000_000 + b"</testsuite>", "larger than 20 MB"),
        (b'<?xml version="1.0" encoding="nonsense"?><testsuite/>', "not well-formed"),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(JUnitError, match=message):
        read_junit(data)


def test_names_are_bounded() -> None:
    case = b'<testcase name="' + b"n" * 10_000 + b'"><failure/></testcase>'
    counts = read_junit(b"<testsuite>" + case * 50 + b"</testsuite>")
    assert counts.failed == 50
    assert len(counts.names) == 20
    assert max(map(len, counts.names)) == 200
