"""The command line: options become records, a command calls the pipeline once, and prints its result."""
