"""Everything that asks a runtime: latency, cost, what was executed, and SQNR of shipped models."""
