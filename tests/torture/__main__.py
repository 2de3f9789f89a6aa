"""What bitalloy survives: `make torture`, or `python -m tests.torture [PART ...] --minutes 15 --out torture.json`.

    kills     SIGKILL at random times; the numbers of an undisturbed run come out all the same
    files     mutated files of every kind that is read: a refusal or a result, no traceback, crash or hang
    options   every option of every command with absurd values: one message within two seconds
    places    disks that are full, folders that cannot be written, other file systems, locales and names
    many      ten thousand images: memory of calibration, seconds of listing and hashing

Each part ends when its share of the time is over; the figures say how many cases that were. The exit code is 1 where
one is faulty.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

PARTS = {"kills": 0.37, "files": 0.4, "options": 0.1, "places": 0.08, "many": 0.05}
"""Part -> its share of the time."""


def main() -> None:
    """Run the parts that are asked for, print and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all by default")
    minutes = float(os.environ.get("TORTURE_MINUTES", "15"))
    parser.add_argument("--minutes", type=float, default=minutes, help="for all parts; default 15, or TORTURE_MINUTES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("torture.json"), help="file for the figures")
    asked = parser.parse_args()
    unknown = set(asked.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no parts are called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    from tests.torture import files, kills, many, options, places

    suites = {"kills": kills, "files": files, "options": options, "places": places, "many": many}
    whole = sum(PARTS[name] for name in asked.parts)
    found: dict[str, dict[str, object]] = {}
    for name in asked.parts:
        began = time.monotonic()
        seconds = 60 * asked.minutes * PARTS[name] / whole
        figures = suites[name].suffer(seconds, asked.seed)
        found[name] = {**figures, "seconds": round(time.monotonic() - began)}
        print(f"{name}: {json.dumps(found[name])[:3000]}", flush=True)
        asked.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if any(part["faults"] for part in found.values()) else 0)


if __name__ == "__main__":
    main()
