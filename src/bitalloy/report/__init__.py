"""What a run says to a reader: one offline HTML page, and the sensitivity table as CSV and JSON."""
