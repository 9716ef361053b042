"""A page about finished runs: what was compared, what came out, what was chosen, and why."""

from hf_adapt.report.page import write_report
from hf_adapt.report.runs import ReportError

__all__ = ["ReportError", "write_report"]
