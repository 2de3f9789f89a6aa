"""Sensitivities in parts: whatever is killed, repeated or kept apart, the merge has the bytes of one process."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Inputs, Inside

from bitalloy.core.shares import NO_PART, JobShare

PLAIN = ("--calibration-samples", "4", "--probes", "1", "--no-equalize", "--no-bias-correction")
START = "from bitalloy.cli.main import main; main()"
DEADLY = """
import os, signal
from bitalloy.core.store import RunDirectory
put = RunDirectory.put
def deadly(self, stage, key, data, shard=None):
    put(self, stage, key, data, shard)
    if stage == "probe":
        os.kill(os.getpid(), signal.SIGKILL)
RunDirectory.put = deadly
from bitalloy.cli.main import main; main()
"""


def asked(inputs: Inputs, *options: object) -> tuple[object, ...]:
    return ("sensitivity", inputs.detector, "--data", inputs.scenes, *PLAIN, "--samples", "6", *options)


def stored(folder: Path) -> dict[str, bytes]:
    """Results of a run directory and the files that people read."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def shards(folder: Path, stage: str) -> list[str]:
    """Parts of the results of a stage, by name."""
    return sorted(path.name for path in (folder / "cache").glob(f"{stage}-*.d/*"))


def begin(folder: Path, words: tuple[object, ...], start: str = START) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", start, *map(str, words)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("jobs", "parts"), [(0, 3), (2, 5), (16, 3), (16, 16)])
def test_every_job_is_of_one_part(jobs: int, parts: int) -> None:
    shares = [JobShare(part, parts, ("probe",)) for part in range(1, parts + 1)]
    own = [[number for turn in share.turns("probe", jobs) for number in turn] for share in shares]
    assert sorted(number for numbers in own for number in numbers) == list(range(jobs))
    assert max(map(len, own)) - min(map(len, own)) <= 1
    for share, numbers in zip(shares, own, strict=True):
        needed = [number for turn in share.turns("calibrate", jobs) for number in turn]
        assert sorted(needed) == list(range(jobs)) and needed[: len(numbers)] == numbers
    assert JobShare(NO_PART, parts, ("probe",)).turns("probe", jobs) == []


def test_processes_in_one_store(inputs: Inputs, here: Path, inside: Inside) -> None:
    words = [asked(inputs, "--shard", f"{part}/3", "--store", "store") for part in (1, 2, 3)]
    killed = begin(here, words[1], DEADLY)
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    assert len(shards(here / "store", "probe")) == 1
    running = [begin(here, some) for some in words]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert len(shards(here / "store", "probe")) == 6
    assert not list((here / "store").rglob("*.partial"))
    inside("merge", "store", "--out", "merged").succeeded()
    inside(*asked(inputs, "--out", "local")).succeeded()
    assert stored(here / "merged") == stored(here / "local")
    before = stored(here / "store")
    inside("merge", "store", "--out", "store").succeeded()
    assert stored(here / "store").items() >= before.items()
    assert (here / "store" / "sensitivity.json").read_bytes() == (here / "local" / "sensitivity.json").read_bytes()


def test_stores_of_their_own(inputs: Inputs, here: Path, inside: Inside) -> None:
    def part(number: int, *options: object, store: str = "") -> Any:
        place = store or f"store {number}"
        return inside(*asked(inputs, *options, "--shard", f"{number}/3", "--store", place))

    told = part(1).succeeded().out
    assert "Part 1 of 3 is done: 'store 1' has 2 of 6 results of the stage 'probe'" in told
    report = json.loads(part(2, "--json").succeeded().out)
    assert (report["stage"], report["there"], report["total"], report["missing"]) == ("probe", 2, 6, [1, 3])
    first, second = (shards(here / f"store {number}", "probe") for number in (1, 2))
    assert len(first) == len(second) == 2 and not set(first) & set(second)

    message = inside("merge", "store 1", "store 2", "--out", "merged").refused()
    assert "Of the stage 'probe', part 3 is missing: 4 of 6 results are there." in message
    assert "sensitivity.json" not in inside.results("merged")
    command = shlex.split(message.partition("Run: ")[2])
    assert command[0] == "bitalloy" and command[-4:] == ["--shard", "3/3", "--store", "store 1"]
    inside(*command[1:-1], "store 3").succeeded()
    inside("merge", "store 1", "store 2", "store 3", "--out", "merged").succeeded()
    inside(*asked(inputs, "--out", "local")).succeeded()
    assert stored(here / "merged") == stored(here / "local")

    refuse_foreign(inputs, here, inside, part)


def refuse_foreign(inputs: Inputs, here: Path, inside: Inside, part: Any) -> None:
    """Parts of another question, model or data have no place in a store, and a damaged result is found."""
    before = stored(here / "store 1")
    assert "seed 0 against 1" in part(2, "--seed", "1", store="store 1").refused()
    assert "number of parts 3 against 4" in inside(*asked(inputs, "--shard", "2/4", "--store", "store 1")).refused()
    model = (inputs.classifier, "--data", inputs.images, *PLAIN, "--samples", "6")
    foreign = ("sensitivity", *model, "--shard", "1/3", "--store")
    message = inside(*foreign, "store 1").refused()
    assert "'store 1' holds results of another question" in message
    assert "model " in message and "data " in message
    assert stored(here / "store 1") == before
    inside(*foreign, "foreign").succeeded()
    message = inside("merge", "store 1", "foreign", "store 3", "--out", "other").refused()
    assert "than in 'foreign': model " in message
    assert not (here / "other").exists()
    assert "is no store of parts" in inside("merge", "nothing", "--out", "other").refused()

    (result,) = (here / "store 1" / "cache").glob("probe-*.d/" + shards(here / "store 1", "probe")[0])
    result.write_bytes(result.read_bytes()[:-1])
    assert "differ: one is damaged" in inside("merge", "store 1", "store 2", "store 3", "--out", "merged").refused()
    (here / "store 1" / "shards.json").write_text('{"parts": 0}')
    assert "is damaged" in inside("merge", "store 1", "--out", "merged").refused()


def test_what_follows_the_probe_is_shared_out_too(inputs: Inputs, here: Path, inside: Inside) -> None:
    question = asked(inputs, "--confirm", "2", "--samples", "2")
    parts = [(*question, "--shard", f"{part}/2", "--store", "store") for part in (1, 2)]
    assert "1 of 2 results of the stage 'probe'" in inside(*parts[0]).succeeded().out
    assert "results of the stage 'exact'" in inside(*parts[1]).succeeded().out
    assert "Of the stage 'exact', part 1 is missing" in inside("merge", "store", "--out", "merged").refused()
    assert "and so are all others" in inside(*parts[0]).succeeded().out
    inside("merge", "store", "--out", "merged").succeeded()
    inside(*question, "--out", "local").succeeded()
    assert stored(here / "merged") == stored(here / "local")


@pytest.mark.parametrize("kind", ["exact", "metric"])
def test_what_is_measured_is_shared_out(kind: str, inputs: Inputs, here: Path, inside: Inside) -> None:
    exact = ("--method", "exact", "--samples", "2", "--regions", "*")
    metric = ("--metric", "--eval", inputs.labels, "--limit", "4", "--regions", "*")
    question = asked(inputs, *(exact if kind == "exact" else metric))
    for part in (1, 2):
        inside(*question, "--shard", f"{part}/2", "--store", f"store-{part}").succeeded()
    every = [shards(here / f"store-{part}", kind) for part in (1, 2)]
    assert all(every) and not set(every[0]) & set(every[1])
    merged = inside("merge", "store-1", "store-2", "--out", "merged", "--json").succeeded()
    assert merged.out == inside(*question, "--out", "local", "--json").succeeded().out
    assert stored(here / "merged") == stored(here / "local")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--shard", "2/8"), "--shard and --store belong together"),
        (("--store", "store"), "--shard and --store belong together"),
        (("--shard", "0/8", "--store", "store"), "expected a part and the number of parts, such as 2/8"),
        (("--shard", "9/8", "--store", "store"), "expected a part and the number of parts, such as 2/8"),
        (("--shard", "1/99999", "--store", "store"), "expected a part and the number of parts, such as 2/8"),
        (("--shard", "two", "--store", "store"), "expected a part and the number of parts, such as 2/8"),
    ],
)
def test_wrong_parts(options: tuple[str, ...], told: str, inputs: Inputs, here: Path, inside: Inside) -> None:
    assert told in inside(*asked(inputs, *options)).refused()
    assert not (here / "store").exists()


def test_a_model_that_is_exported_first_is_not_shared_out(inside: Inside) -> None:
    message = inside("sensitivity", "segformer-b0", "--shard", "1/2", "--store", "store").refused()
    assert "Use `bitalloy export segformer-b0`" in message


def test_other_machines_are_refused(
    inputs: Inputs, here: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asked(inputs, "--shard", "1/1", "--store", "store")
    inside(*one).succeeded()
    path = here / "store" / "shards.json"
    known = json.loads(path.read_text())
    known["facts"]["threads"] += 1
    path.write_text(json.dumps(known))
    cores = known["facts"]["threads"]
    for words in (one, ("merge", "store", "--out", "merged")):
        assert f"than here: cores {cores} against {cores - 1}. Give" in inside(*words).refused()
