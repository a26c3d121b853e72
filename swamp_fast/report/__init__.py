"""Reports: HTML pages, figures and tables, made from the files in the folder of a run, sweep or comparison."""

from swamp_fast.report.write import write_report

__all__ = ["write_report"]
