"""The command line: `bitalloy` and `python -m bitalloy`.

It imports nothing slow at its top, so that an interrupt is answered with one line from the first moment on.
"""

import signal
import sys

_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of a command that was interrupted, and of one that was asked to end."""


def start() -> None:
    """Run the command line; an interrupt, or SIGTERM, ends with one line and exit code 130, or 143.

    Both end what runs as an exception does, so that temporary files are removed and child processes end.
    """
    code = _INTERRUPTED

    def terminate(number: int, frame: object) -> None:
        nonlocal code
        signal.signal(number, signal.SIG_IGN)  # what is being removed is removed to the end
        code = _TERMINATED
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, terminate)
        from bitalloy.cli.main import main as run

        run()
    except KeyboardInterrupt:
        store = sys.modules.get("bitalloy.core.store")
        told = store.told_stop() if store is not None else "Stopped. The same command goes on from here."
        sys.stderr.write(f"{told}\n")
        sys.exit(code)


if __name__ == "__main__":
    start()
