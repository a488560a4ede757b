"""One self-contained page an orchestration, for people to decide with."""

from sandbox_pipeline.report.page import REPORT_FILE, render, write_report

__all__ = ["REPORT_FILE", "render", "write_report"]
