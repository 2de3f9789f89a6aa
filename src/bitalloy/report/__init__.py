"""What a run says to a reader: one offline HTML page, and the sensitivity table as CSV and JSON."""

from bitalloy.report.render import render
from bitalloy.report.tables import sensitivity_csv, sensitivity_json

__all__ = ["render", "sensitivity_csv", "sensitivity_json"]
