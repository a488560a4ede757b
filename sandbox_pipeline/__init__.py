"""One coding prompt, one git repository, N isolated attempts, on Dagster."""

__version__ = "0.1.0"
