"""The command line: options become records, one pipeline call is made, and its result is printed."""
