"""Secrets are found plain, URL-encoded, in base64 at any alignment, and across chunks."""

from __future__ import annotations

import base64
import json
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_pipeline.redaction import Redactor

SECRET = "sk-ant-canary/+42=x"


@pytest.mark.parametrize("padding", range(4))
def test_base64_is_found_at_any_alignment(padding: int) -> None:
    encoded = base64.b64encode(b"x" * padding + SECRET.encode() + b"tail")
    cleaned, leaked = Redactor([SECRET]).clean(encoded)
    assert leaked
    assert SECRET.encode() not in base64.b64decode(encoded) or b"[redacted]" in cleaned


def test_url_encoding_is_found() -> None:
    text = f"https://x/?key={urllib.parse.quote(SECRET, safe='')}&y"
    assert Redactor([SECRET]).text(text) == "https://x/?key=[redacted]&y"


def test_short_values_are_no_secrets() -> None:
    assert Redactor(["abc", ""]).text("abc") == "abc"


def test_names_come_from_the_environment() -> None:
    redactor = Redactor.from_environ({"E2B_API_KEY": "e2b_canary", "MINE": "my-canary"}, ["MINE"])
    assert redactor.text("e2b_canary my-canary") == "[redacted] [redacted]"


@given(
    st.lists(st.sampled_from([b"plain ", SECRET.encode(), b"\n", b"sk-ant-", b"\xff"]), max_size=8),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_a_stream_never_lets_a_secret_through_however_it_is_cut(
    parts: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(parts)
    stream = Redactor([SECRET]).stream()
    out = b""
    position = 0
    for cut in sorted(cut for cut in cuts if cut <= len(data)):
        out += stream.feed(data[position:cut])
        position = cut
    out += stream.feed(data[position:]) + stream.finish()
    assert SECRET.encode() not in out
    assert out == data.replace(SECRET.encode(), b"[redacted]")
    assert stream.leaked == (SECRET.encode() in data)


def test_wrapped_base64_is_found_and_its_lines_stay() -> None:
    secret = "canary-7f3a9d2e51c8-canary"
    for offset in range(60):
        text = base64.encodebytes(b"x" * offset + secret.encode() + b"y" * 90)
        patch = b"".join(b"+" + line for line in text.splitlines(keepends=True))
        for data in (text, patch, json.dumps(text.decode()).encode()):
            cleaned, found = Redactor([secret]).clean(data)
            assert found
            assert cleaned.count(b"\n") == data.count(b"\n")
            stream = Redactor([secret]).stream()
            chunks = [stream.feed(data[i : i + 7]) for i in range(0, len(data), 7)]
            assert b"".join(chunks) + stream.finish() == cleaned
