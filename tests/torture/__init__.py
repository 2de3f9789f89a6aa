"""Suites that torment the command line; see `__main__`. pytest does not collect them."""
