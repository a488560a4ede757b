"""A native program that is an outdated Claude Code as far as its version tells."""

from __future__ import annotations

import platform
import struct
from pathlib import Path

import pytest

OLD_VERSION = "1.0.3"
_BASE = 0x400000
_HEADERS_BYTES = 120
# Writes the text, then exits with 0, by the system calls themselves.
_CODE = "b801000000 bf01000000 488d3510000000 ba{length} 0f05 b83c000000 31ff 0f05"


def old_claude(path: Path) -> Path:
    """Write the program: Linux's smallest, since only a native one is taken for Claude Code."""
    if platform.machine() != "x86_64":
        pytest.skip("the program that says an old version is made for x86_64")
    text = f"{OLD_VERSION} (Claude Code)\n".encode()
    code = bytes.fromhex(_CODE.format(length=struct.pack("<I", len(text)).hex()))
    size = _HEADERS_BYTES + len(code) + len(text)
    magic = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    # Of the file: executable, x86-64, its entry; of its one segment: load all, read and execute.
    fields = (2, 62, 1, _BASE + _HEADERS_BYTES, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    header = magic + struct.pack("<HHIQQQIHHHHHH", *fields)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    path.write_bytes(header + segment + code + text)
    path.chmod(0o755)
    return path
