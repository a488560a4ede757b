"""The model API's latest answer as it came, for when it can't be read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, cast

from sandbox_pipeline.redaction import Redactor

if TYPE_CHECKING:
    import anthropic
    import httpx2

KEPT_BYTES = 24_000
SHOWN_CHARS = 20_000
"""Less than what is kept, so that no secret is cut in two before it is found."""
MAX_ANSWER_BYTES = 10_000_000
"""Many times what `MAX_ANSWER_TOKENS` can take; the SDK holds an answer several times."""


MAX_ERROR_BYTES = 64_000
"""Of an answer that is an error; what comes after is left unread."""


class AnswerTooLargeError(Exception):
    """The answer is larger than any model's."""


class RawAnswer:
    """Keeps the beginning of each answer until the next one comes, and bounds all of it."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def shown(self, redactor: Redactor) -> str:
        """At most `SHOWN_CHARS` of the latest answer; undecodable bytes are replaced."""
        return redactor.text(self._kept.decode("utf-8", "replace"))[:SHOWN_CHARS]

    def client(self) -> anthropic.DefaultAsyncHttpxClient:
        """The SDK's usual HTTP client, listened to."""
        import anthropic

        return anthropic.DefaultAsyncHttpxClient(
            headers={"accept-encoding": "identity"}, event_hooks={"response": [self._listen]}
        )

    async def _listen(self, response: httpx2.Response) -> None:
        import httpx2

        kept = self._kept = bytearray()
        is_error = response.status_code >= 400
        source = cast("httpx2.AsyncByteStream", response.stream)

        class Tapped(httpx2.AsyncByteStream):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                size = 0
                async for chunk in source:
                    kept.extend(chunk[: KEPT_BYTES - len(kept)])
                    size += len(chunk)
                    if is_error and size > MAX_ERROR_BYTES:
                        return
                    if size > MAX_ANSWER_BYTES:
                        raise AnswerTooLargeError
                    yield chunk

            async def aclose(self) -> None:
                await source.aclose()

        response.stream = Tapped()
