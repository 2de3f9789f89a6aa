"""Weight-only models made by NNCF, for `size_quality.py`: runs in an environment that has `nncf` and `openvino`.

    PEERS_PYTHON benchmarks/peer_weights.py JOB.json

The job names the float model, a folder for the results, an .npz with the samples' feeds (`0/name`, `1/name`, ...) and
the variants: name -> `mode` (a name of `CompressWeightsMode`), `ratio`, `group_size`, and whether it sees `data`. A
variant becomes NAME.xml with NAME.bin. The job's result file gets the packages' versions. Nothing of bitalloy is used.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def samples(path: Path) -> list[dict[str, np.ndarray]]:
    """Feeds of all samples, by the names of the inputs."""
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            number, name = key.split("/", 1)
            found.setdefault(int(number), {})[name] = arrays[key]
    return [found[i] for i in sorted(found)]


def main() -> None:
    """Do the job."""
    import nncf
    import openvino as ov

    job = json.loads(Path(sys.argv[1]).read_text())
    feeds, out = samples(Path(job["samples"])), Path(job["out"])
    for name, variant in job["variants"].items():
        model = ov.Core().read_model(job["model"])
        order = [port.get_node().get_friendly_name() for port in model.inputs]
        given: dict[str, Any] = {"mode": nncf.CompressWeightsMode[variant["mode"]]}
        given |= {key: variant[key] for key in ("ratio", "group_size") if key in variant}
        if variant.get("data"):
            given["dataset"] = nncf.Dataset([[feed[i] for i in order] for feed in feeds])
        compressed = nncf.compress_weights(model, **given)
        ov.save_model(compressed, out / f"{name}.xml", compress_to_fp16=False)
    versions = {package: importlib.metadata.version(package) for package in ("nncf", "openvino")}
    Path(job["result"]).write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
