"""Reports: HTML pages, figures and tables, made from what a run, a sweep or a comparison left in its folder."""

from swamp_fast.report.write import write_report

__all__ = ["write_report"]
