"""`python -m sandbox_pipeline`."""

from sandbox_pipeline.cli import main

main()
