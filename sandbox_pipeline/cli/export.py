"""`sandbox-pipeline export`."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click

from sandbox_pipeline.cli.common import with_runtime
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.runtime import Runtime

TABLES = ("fork_metrics", "orchestration_summary")


@click.command("export")
@click.option("--table", type=click.Choice(TABLES), default=TABLES[0], show_default=True)
@click.option("--workflow", help="Only this orchestration; default: all.")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["csv", "jsonl", "parquet"]),
    default="csv",
    show_default=True,
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="File to write; default: standard output."
)
def command(table: str, workflow: str | None, file_format: str, output: Path | None) -> int:
    r"""Write the metrics of all orchestrations, one row a fork or one an orchestration.

    \b
    Examples:
      sandbox-pipeline export > forks.csv
      sandbox-pipeline export --table orchestration_summary --format parquet --output all.parquet
    """
    from sandbox_pipeline.metrics import frame
    from sandbox_pipeline.store import tables

    chosen = getattr(tables, table)

    async def read(runtime: Runtime) -> list[dict[str, Any]]:
        return await runtime.store.rows(chosen, workflow)

    data = frame(chosen, with_runtime(read))
    buffer = io.BytesIO()
    if file_format == "csv":
        data.to_csv(buffer, index=False)
    elif file_format == "jsonl":
        data.to_json(buffer, orient="records", lines=True, date_format="iso")
    else:
        try:
            data.to_parquet(buffer, index=False)
        except ImportError:
            msg = "--format: parquet needs pyarrow; install sandbox-pipeline[parquet]"
            raise ConfigError(msg) from None
    if output is None:
        sys.stdout.buffer.write(buffer.getvalue())
        sys.stdout.buffer.flush()
    else:
        try:
            output.write_bytes(buffer.getvalue())
        except OSError as error:
            msg = f"--output: {output}: {error.strerror}"
            raise ConfigError(msg) from error
    return 0
