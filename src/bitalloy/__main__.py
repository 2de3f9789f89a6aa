"""`python -m bitalloy`."""

from bitalloy.cli import main

main()
