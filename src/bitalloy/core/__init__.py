"""What everything else rests on: records, plans, results of a run, errors, the run directory, jobs."""
