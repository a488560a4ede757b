"""Secrets are found plain, URL-encoded, in base64 at any alignment, and across chunks."""

from __future__ import annotations

import base64
import hashlib
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


LONG = "sk-ant-canary-" + base64.b64encode(hashlib.sha512(b"canary").digest()).decode()


@pytest.mark.parametrize("left", [0.99, 0.9, 0.75, 0.6])
def test_a_secret_that_was_cut_short_is_found(left: float) -> None:
    forms = [LONG.encode(), urllib.parse.quote(LONG, safe="").encode()]
    for offset in range(3):
        padded = b"x" * offset + LONG.encode() + b"yz"
        forms += (base64.b64encode(padded), base64.encodebytes(padded))
    for form in forms:
        kept = int(len(form) * left)
        for cut in (form[:kept], form[-kept:]):
            for data in (cut, b"before\n" + cut + b"\nafter", json.dumps(cut.decode()).encode()):
                cleaned, found = Redactor([LONG]).clean(data)
                assert found
                rest = cleaned.replace(b"before\n", b"").replace(b"\nafter", b"")
                # Of base64, the outermost characters depend on what is around the secret.
                assert len(rest.replace(b"\\n", b"").replace(b"[redacted]", b"")) <= 10


def test_what_secrets_share_with_others_is_no_secret() -> None:
    text = f"{LONG[:40]} and {LONG[-40:]}"
    assert Redactor([LONG]).text(text) == text


@pytest.mark.parametrize(
    "value",
    [
        "https://api.example.com/v1/models",
        "/usr/local/sbin:/usr/local/bin:/usr/bin",
        "/opt/python3.11/lib/site-packages",
        "claude-opus-4-20250514",
        "feature/2024-10-login-v2-for-the-new-pages",
        "the tests in the folder number 1 must pass",
    ],
)
def test_what_is_no_token_is_only_found_whole(value: str) -> None:
    half = (len(value) + 1) // 2
    redactor = Redactor([value])
    for text in (value[:half], value[half:], value[:-1], value[1:]):
        assert redactor.text(text) == text
    assert redactor.text(f"<{value}>") == "<[redacted]>"


def test_of_two_secrets_that_begin_alike_nothing_is_left() -> None:
    alike = ["canary-secret-1", "canary-secret-2-which-is-longer", "canary-secret-2-and-longer"]
    assert Redactor(alike).text(" ".join(alike)) == " ".join(["[redacted]"] * 3)


@given(st.binary(min_size=9, max_size=60), st.integers(1, 70), st.sampled_from(["", "+"]))
def test_any_wrapping_of_base64_is_found(raw: bytes, width: int, prefix: str) -> None:
    secret = raw.hex() + "?>~" * 3
    text = base64.b64encode(secret.encode()).decode()
    lines = [prefix + text[i : i + width] for i in range(0, len(text), width)]
    cleaned, found = Redactor([secret]).clean("\n".join(lines).encode())
    assert found
    assert cleaned.count(b"\n") == len(lines) - 1
    # The last characters depend on what comes after the secret.
    assert len(cleaned.translate(None, b"\n+=").replace(b"[redacted]", b"")) <= 2


@given(st.text(st.sampled_from("\\nr+\n\rab"), min_size=6, max_size=40))
def test_secrets_of_the_characters_of_line_breaks_are_found(secret: str) -> None:
    redactor = Redactor([secret])
    if len(secret.strip()) >= 6:
        assert secret.strip() not in redactor.text(f"a {secret} b")


@pytest.mark.parametrize(
    ("secret", "data"),
    [
        ("abcdefgh1234x++yzABC9876k", b"abcdefgh1234x\n++yzABC9876k"),
        ("nrpass!word", rb"C:\\nrpass!word"),
        ("Ab1" * 9 + "++" + "Cd2" * 9, b"Ab1" * 9 + b"\n++" + b"Cd2" * 9),
    ],
)
def test_what_may_belong_to_a_line_break_hides_nothing(secret: str, data: bytes) -> None:
    cleaned, found = Redactor([secret]).clean(data)
    assert found
    assert secret.encode()[-6:] not in cleaned


def test_a_part_of_one_secret_takes_nothing_from_another() -> None:
    one, other = f"q{LONG[14:60]}Super", "Super secret phrase 12345"
    data = one[:-5] + other
    assert "ecret phrase" not in Redactor([one, other]).text(data)


@pytest.mark.parametrize("before", ["hello\n", "hello\t", "\x1b", "\\", "\\\\", '"'])
@pytest.mark.parametrize("first", ["n", "t", "u001b", "1b"])
def test_json_stays_json(before: str, first: str) -> None:
    secret = first + LONG.replace("+", "n")
    line = json.dumps({"a": before + secret, "b": before + secret[len(secret) // 2 :]})
    cleaned = Redactor([secret]).text(line)
    assert LONG[-20:] not in cleaned
    assert set(json.loads(cleaned)) == {"a", "b"}
