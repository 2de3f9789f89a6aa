"""`python -m bitalloy`."""

from bitalloy.cli.main import main

main()
