"""The command line: `bitalloy` and `python -m bitalloy`.

It imports nothing at its top, so that an interrupt is answered with one line from the first moment on.
"""

import sys


def start() -> None:
    """Run the command line; an interrupt ends with one line and exit code 130."""
    try:
        from bitalloy.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. The same command goes on from here.\n")
        sys.exit(130)


if __name__ == "__main__":
    start()
