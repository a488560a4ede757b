"""Known secrets out of everything that is stored or shown."""

from __future__ import annotations

import base64
import re
import urllib.parse
from collections.abc import Iterable, Mapping

SECRET_VARIABLES = (
    "E2B_API_KEY",
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "GITHUB_TOKEN",
)
MIN_SECRET_LENGTH = 6
MARK = b"[redacted]"
# base64 is wrapped into lines, which in a patch begin with + and in JSON are written \\n.
_LINE_BREAK = rb"(?:(?:\\r|\r)?(?:\\n|\n)\+?)"
_LONGEST_BREAK = 5


class Redactor:
    """Replaces secrets: plain, URL-encoded, and in base64 at any alignment, wrapped or not.

    Args:
        secrets: the values; shorter ones than `MIN_SECRET_LENGTH` are ignored, since they
            would blank out ordinary text.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        forms: set[bytes] = set()
        for secret in secrets:
            stripped = secret.strip()
            if len(stripped) >= MIN_SECRET_LENGTH:
                forms |= _forms(stripped)
        ordered = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(_wrapped, ordered))) if ordered else None
        self._longest = max(map(len, ordered), default=0) * (1 + _LONGEST_BREAK)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], names: Iterable[str] = ()) -> Redactor:
        """A redactor of the values of `SECRET_VARIABLES` and of the variables named."""
        wanted = dict.fromkeys((*SECRET_VARIABLES, *names))
        return cls(environ[name] for name in wanted if environ.get(name))

    def clean(self, data: bytes) -> tuple[bytes, bool]:
        """The data without secrets, and whether there were any."""
        if self._pattern is None:
            return data, False
        cleaned, count = self._pattern.subn(_mark, data)
        return cleaned, count > 0

    def text(self, text: str) -> str:
        """The text without secrets."""
        if self._pattern is None:
            return text
        return self.clean(text.encode("utf-8", "surrogateescape"))[0].decode(
            "utf-8", "surrogateescape"
        )

    def stream(self) -> RedactedStream:
        """A filter for data that comes in chunks, which may cut a secret in two."""
        return RedactedStream(self._pattern, self._longest)


class RedactedStream:
    """Filters chunks; holds back as many bytes as a secret that has only begun could have."""

    def __init__(self, pattern: re.Pattern[bytes] | None, longest: int) -> None:
        self._pattern = pattern
        self._longest = longest
        self._held = b""
        self.leaked = False

    def feed(self, chunk: bytes) -> bytes:
        """What is safe to store now."""
        if self._pattern is None:
            return chunk
        data = self._held + chunk
        cut = max(0, len(data) - (self._longest - 1))
        out: list[bytes] = []
        position = 0
        for match in self._pattern.finditer(data):
            if match.start() >= cut:
                break
            out += (data[position : match.start()], _mark(match))
            position = match.end()
            self.leaked = True
        end = max(cut, position)
        out.append(data[position:end])
        self._held = data[end:]
        return b"".join(out)

    def finish(self) -> bytes:
        """The rest, once no more comes."""
        rest = self._held
        self._held = b""
        if self._pattern is None:
            return rest
        cleaned, count = self._pattern.subn(_mark, rest)
        self.leaked = self.leaked or count > 0
        return cleaned


def _wrapped(form: bytes) -> bytes:
    """A pattern of this form, with line breaks anywhere in it."""
    return (_LINE_BREAK + b"?").join(re.escape(form[i : i + 1]) for i in range(len(form)))


def _mark(match: re.Match[bytes]) -> bytes:
    # The breaks stay: a patch whose lines are fewer than it says can't be applied.
    return MARK + b"".join(re.findall(_LINE_BREAK, match[0]))


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
