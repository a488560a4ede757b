"""Known secrets out of everything that is stored or shown."""

from __future__ import annotations

import base64
import functools
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

SECRET_VARIABLES = (
    "E2B_API_KEY",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "GITHUB_TOKEN",
)
MIN_SECRET_LENGTH = 6
# A token that was cut short is looked for from this many characters on, and from half of it: less
# is of no use to whoever reads it, and might be ordinary text, as a token's public prefix is.
# Addresses, paths and sentences, which may be in variables as well, begin like many others.
_MIN_PART_LENGTH = 12
_TOKEN = re.compile(r"(?!/)[\w.~+/=-]+", re.ASCII)
_MIXED = re.compile(rb"(?=.*[0-9]).*[A-Za-z]")
MARK = b"[redacted]"
# base64 is wrapped into lines, which in a patch begin with + and in JSON are written \\n.
_LINE_BREAK = rb"(?:(?:\\r|\r)?(?:\\n|\n)\+?)"
_LONGEST_BREAK = 5
_BREAK = re.compile(_LINE_BREAK)


class Redactor:
    """Replaces secrets: plain, URL-encoded, and in base64 at any alignment, wrapped or not.

    A token that was cut short is replaced too, as long as its first or its last half is there.

    Args:
        secrets: the values; shorter ones than `MIN_SECRET_LENGTH` are ignored, since they
            would blank out ordinary text.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        parts: dict[bytes, set[bytes]] = {}
        for secret in secrets:
            stripped = secret.strip()
            if len(stripped) >= MIN_SECRET_LENGTH:
                parts |= {form: _recognized_by(form, stripped) for form in _forms(stripped)}
        self._forms = _FormFinder(parts)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], names: Iterable[str] = ()) -> Redactor:
        """A redactor of the values of `SECRET_VARIABLES` and of the variables named."""
        wanted = dict.fromkeys((*SECRET_VARIABLES, *names))
        return cls(environ[name] for name in wanted if environ.get(name))

    def clean(self, data: bytes) -> tuple[bytes, bool]:
        """The data without secrets, and whether there were any."""
        stream = self.stream()
        cleaned = stream.feed(data) + stream.finish()
        return cleaned, stream.leaked

    def text(self, text: str) -> str:
        """The text without secrets."""
        return self.clean(text.encode("utf-8", "surrogateescape"))[0].decode(
            "utf-8", "surrogateescape"
        )

    def stream(self) -> RedactedStream:
        """A filter for data that comes in chunks, which may cut a secret in two."""
        return RedactedStream(self._forms)


class RedactedStream:
    """Filters chunks; holds back as many bytes as a secret that has only begun could have."""

    def __init__(self, forms: _FormFinder) -> None:
        self._forms = forms
        self._held = b""
        self.leaked = False

    def feed(self, chunk: bytes) -> bytes:
        """What is safe to store now."""
        data = self._held + chunk
        return self._clean(data, until=max(0, len(data) - self._forms.longest))

    def finish(self) -> bytes:
        """The rest, once no more comes."""
        return self._clean(self._held, until=len(self._held))

    def _clean(self, data: bytes, *, until: int) -> bytes:
        """The data up to there without what is found to begin there; the rest is held."""
        out: list[bytes] = []
        position = 0
        for start, end in self._forms.find(data):
            if start < until and end > position:
                begin = max(start, position)
                out += (data[position:begin], _mark(data[begin:end]))
                position = end
                self.leaked = True
        end = max(until, position)
        out.append(data[position:end])
        self._held = data[end:]
        return b"".join(out)


class _FormFinder:
    """Finds forms of secrets, from parts of them on.

    Attributes:
        longest: bytes that what is found may have.
    """

    def __init__(self, parts: Mapping[bytes, set[bytes]]) -> None:
        """Take the parts that are to be looked for, by form; whole ones are parts as well."""
        self._forms = list(parts)
        self.longest = max(map(len, parts), default=0) * (1 + _LONGEST_BREAK)
        self._texts = sorted(set[bytes]().union(*parts.values()), key=len, reverse=True)
        self._needles = list(map(_needle, self._texts))

    @functools.cached_property
    def _pattern(self) -> re.Pattern[bytes]:
        # A tenth of a second, so only once there is something; and without groups, with which
        # `re` would stop at each byte and not only where a part may begin.
        return re.compile(b"|".join(map(_wrapped, self._texts)))

    @functools.cached_property
    def _parts(self) -> dict[bytes, _Part]:
        return {
            text: _Part(
                matches=re.compile(_wrapped(text)).fullmatch,
                after=[form[len(text) :] for form in self._forms if form.startswith(text)],
                before=[form[: -len(text)] for form in self._forms if form.endswith(text)],
            )
            for text in self._texts
        }

    def find(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Where they begin and end, in order of their ends; they may overlap."""
        if not self._needles or not self._may_be_in(_hay(data)):
            return
        for match in self._pattern.finditer(data):
            begins, ends = [match.start()], [match.end()]
            for part in self._parts_of(match[0]):
                begins += (_grow_back(before, data, match.start()) for before in part.before)
                ends += (_grow(after, data, match.end()) for after in part.after)
            yield min(begins), max(ends)

    def _parts_of(self, found: bytes) -> list[_Part]:
        """The parts that this is, with or without line breaks."""
        part = self._parts.get(found)
        return [part] if part else [it for it in self._parts.values() if it.matches(found)]

    def _may_be_in(self, hay: bytes) -> bool:
        for needle in self._needles:  # noqa: SIM110 - `any` takes twice as long for a short line
            if needle in hay:
                return True
        return False


class _Part(NamedTuple):
    """A form's beginning or end, with what comes after or before it in the forms that have it."""

    matches: Callable[[bytes], re.Match[bytes] | None]
    after: list[bytes]
    before: list[bytes]


def _hay(data: bytes) -> bytes:
    """The data without all that is a line break or may belong to one.

    A look at it for needles says many times as fast as `re` that there is nothing.
    """
    data = b"".join(data.replace(rb"\n", b"").replace(rb"\r", b"").split(b"\n"))
    return data.replace(b"\r", b"").replace(b"+", b"")


def _needle(part: bytes) -> bytes:
    """What `_hay` leaves of this part wherever it is; nothing, which is in any hay, if unsure."""
    # The first byte may go, as an n after a backslash that is not the part's.
    return b"" if b"\\" in part else _hay(part[1:])


def _recognized_by(form: bytes, secret: str) -> set[bytes]:
    """The parts of a form of the secret that are enough to know it by."""
    if not _TOKEN.fullmatch(secret):
        return {form}
    length = min(len(form), max(_MIN_PART_LENGTH, (len(form) + 1) // 2))
    halves = {form[:length], form[-length:]}
    return halves if all(map(_MIXED.match, halves)) else {form}


def _grow(after: bytes, data: bytes, end: int) -> int:
    """How far the form goes on from here."""
    for done, wanted in enumerate(after):
        if data.startswith(after[done:], end):
            return end + len(after) - done
        match = _broken(wanted).match(data, end)
        if match is None:
            break
        end = match.end()
    return end


def _grow_back(before: bytes, data: bytes, start: int) -> int:
    """How far the form goes back from here."""
    for left in range(len(before), 0, -1):
        if data.endswith(before[:left], 0, start):
            return start - left
        match = _before_break(before[left - 1]).search(
            data, max(0, start - 1 - _LONGEST_BREAK), start
        )
        if match is None:
            break
        start = match.start()
    return start


@functools.cache
def _broken(byte: int) -> re.Pattern[bytes]:
    return re.compile(_LINE_BREAK + b"?" + re.escape(bytes((byte,))))


@functools.cache
def _before_break(byte: int) -> re.Pattern[bytes]:
    return re.compile(re.escape(bytes((byte,))) + _LINE_BREAK + rb"?\Z")


def _wrapped(form: bytes) -> bytes:
    """A pattern of this form, with line breaks anywhere in it."""
    return (_LINE_BREAK + b"?").join(re.escape(form[i : i + 1]) for i in range(len(form)))


def _mark(found: bytes) -> bytes:
    # The breaks stay: a patch whose lines are fewer than it says can't be applied.
    return MARK + b"".join(_BREAK.findall(found))


def _forms(secret: str) -> set[bytes]:
    raw = secret.encode()
    quoted = urllib.parse.quote(secret, safe="").encode()
    forms = {raw, quoted, urllib.parse.quote_plus(secret).encode()}
    for offset in range(3):
        # A secret inside a longer base64 text: only the characters that depend on nothing
        # but the secret can be looked for.
        encoded = base64.b64encode(b"\0" * offset + raw).rstrip(b"=")
        start = (offset * 8 + 5) // 6
        usable = (offset + len(raw)) * 8 // 6
        core = encoded[start:usable]
        if len(core) >= MIN_SECRET_LENGTH:
            forms |= {core, core.replace(b"+", b"-").replace(b"/", b"_")}
    return forms
