"""Time and peak memory of exporting models of the zoo at full size with random weights, one process each.

    python benchmarks/export_sizes.py yolo11x segformer-b5 mobilesam mobilevlm-v2-1.7b --out /tmp/exports

The exported files are compared with torch on random inputs as always, which is part of the time; they are deleted
unless `--keep` is given. Prints a table row per model, and a line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bitalloy import zoo


def main() -> None:
    """Export each model in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.names[0], given.out)))
        return
    rows = []
    print("model | seconds | CPU seconds | peak GB | files GB | largest difference")
    for name in given.names:
        folder = given.out / name
        command = [sys.executable, __file__, name, "--out", str(folder), "--here"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(" | ".join(str(v) for v in row.values()), flush=True)
        if not given.keep:
            shutil.rmtree(folder)
    print(json.dumps(rows))


def measure(name: str, folder: Path) -> dict[str, object]:
    """Export one model here."""
    start = time.perf_counter()
    exported = zoo.export_model(name, checkpoint=zoo.RANDOM_WEIGHTS, folder=folder)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "model": name,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        "files_gb": round(sum(f.stat().st_size for f in folder.iterdir()) / 1e9, 3),
        "notes": [n for n in exported.notes if "differs" in n],
    }


if __name__ == "__main__":
    main()
