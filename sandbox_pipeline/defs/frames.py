"""DataFrames as Dagster sees them, without pandas until there is one.

A worker needs pandas at the very end only; imported at the start it would be a third of the
worker's memory, and of the time until it does anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dagster as dg

if TYPE_CHECKING:
    from pandas import DataFrame as Frame
else:
    # Dagster evaluates annotations when a definition is made.
    Frame = Any

__all__ = ["FRAME", "Frame"]


def _is_frame(_context: dg.TypeCheckContext, value: object) -> bool:
    import pandas as pd

    return isinstance(value, pd.DataFrame)


FRAME = dg.DagsterType(_is_frame, name="DataFrame", description="A pandas DataFrame.")
"""The Dagster type of what is annotated as `Frame`."""
