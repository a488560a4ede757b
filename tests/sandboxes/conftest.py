"""What the tests of the local provider share."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sandbox_pipeline.sandboxes.local import LocalProvider
from tests.processes import remove_once_idle


@pytest.fixture
def root() -> Iterator[Path]:
    """Folder of local sandboxes, with a short path as sockets need it; not made yet."""
    folder = Path(tempfile.mkdtemp(prefix="sandboxes-"))
    yield folder / "root"
    remove_once_idle(folder)


@pytest.fixture
async def provider(root: Path) -> AsyncIterator[LocalProvider]:
    """The local one; its sandboxes end with the test."""
    made = LocalProvider(root)
    yield made
    for info in await made.list({}):
        await made.kill(info.sandbox_id)
