"""Jobs on several machines: files that travel to them, and the executor that hands jobs to workers of Ray."""
