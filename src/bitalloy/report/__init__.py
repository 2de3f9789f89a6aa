"""Reports of a run: one offline HTML page, and the sensitivity table as CSV and JSON."""
