"""Mutated model files and absurd options: the command line must refuse or work, and never crash or hang.

    python -m tests.fuzz                                  1200 files and 150 option lines, as CONTRIBUTING.md asks for
    python -m tests.fuzz --files 40 --lines 20 --seed 7

A file is one of a few small models of different kinds after one to three mutations: of fields of its messages, or of
its raw bytes. A line is a command with options drawn from texts that no user should write. All follow from the seed;
the name of a case (`file-17`, `line-3`) finds it again with `--only`.

Each case runs in a forked child, so that a crash of the runtime or an endless loop is told from a refusal. It passes
where the exit code is 0, 2, 3 or 4 without a traceback, and where no JSON file that it wrote holds NaN or infinity.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor as Field  # type: ignore[import-untyped]
from tests.conftest import Network, save_feeds, two_inputs

SECONDS = 120
"""Time after which a case counts as a hang; these models take a few seconds on a busy machine."""
QUICK = ("--samples", "1", "--probes", "1", "--calibration-samples", "2")
RUNS = 10
"""One in so many files goes through all of `bitalloy run`, the others through `bitalloy sensitivity`."""
STRANGE = (
    *("", " ", "*", "²", "٣", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e308", "1e-320", "9" * 400, "0x10", "1_000"),
    *(
        "\x07",
        "é" * 50,
        "../..",
        "/",
        "/dev/null",
        "a=b",
        "=",
        "x",
        ",",
        "1,2",
        "1x1",
        "0x0",
        "1x3x8x8",
        "{0..9}",
        "[",
        "[!",
    ),
    *("{0..999}{0..999}{0..999}", "{9..1}", "{0..99999999999999999999}", "fp32:*", "int8:*", "int8:{0..9}{0..9}{0..9}"),
    *("fp32:[", "fp16:*", "w4:*", "0.7x", "0x", "12ms", f"{'9' * 400}x", "²x", "8MB", "1B", "0.5x", "x=1e308", "y=-5"),
    *("ort-cpu", "ort-cpu,ort-cpu", "tensorrt", "minmax", "auto", "NHWC", "crop", "two.onnx", "feeds", "run", "\udcff"),
)
"""Texts for options."""
OPTIONS = {
    "run": (
        *("--data", "--out", "--shape", "--scale", "--mean", "--std", "--layout", "--fit", "--checkpoint", "--target"),
        *("--exclude", "--samples", "--probes", "--calibration-samples", "--ranges", "--limit", "--seed", "--latency"),
        *("--size", "--max-drop-db", "--keep", "--max-drop", "--eval", "--confidence"),
    ),
    "sensitivity": (
        *("--data", "--out", "--shape", "--exclude", "--samples", "--probes", "--calibration-samples", "--ranges"),
        *("--seed", "--method", "--mode", "--units", "--regions", "--sites", "--confirm", "--eval", "--target"),
    ),
    "plan": ("--latency", "--size", "--max-drop-db", "--keep"),
    "audit": ("--data", "--target"),
    "export": ("--checkpoint", "--out", "--image-size", "--seed"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    code: int | None
    """Exit code, below 0 for a signal; None for a hang."""
    text: str
    """What it printed."""
    seconds: float
    cpu_seconds: float = 0.0
    """Time of the processor that it took; 0 for a hang."""
    spoiled: tuple[str, ...] = ()
    """JSON files with numbers that are none."""

    @property
    def fault(self) -> str:
        """What is wrong, in a word; empty where nothing is."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.text:
            return "traceback"
        if self.code not in (0, 2, 3, 4):
            return f"exit code {self.code}"
        return f"spoiled {', '.join(self.spoiled)}" if self.spoiled else ""


def attempt(words: Sequence[str] | Callable[[], object], folder: Path, *, seconds: float = SECONDS) -> Outcome:
    """Run the command line, or a function as if it were a command, in a forked child in a folder, for some time."""
    printed, began = folder / "printed", time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _child(words, folder, printed)
    code, cpu = None, 0.0
    while code is None and time.monotonic() - began < seconds:
        done, status, used = os.wait4(child, os.WNOHANG)
        cpu = used.ru_utime + used.ru_stime if done else 0.0
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.01)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = printed.read_text(errors="replace") if printed.is_file() else ""
    return Outcome(code, text, time.monotonic() - began, cpu, tuple(sorted(_spoiled(folder))))


def _child(words: Sequence[str] | Callable[[], object], folder: Path, printed: Path) -> None:
    code = 99
    try:
        os.chdir(folder)
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", errors="surrogateescape", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="surrogateescape", closefd=False)
        from bitalloy.cli.main import main
        from bitalloy.core.errors import BitalloyError

        try:
            if callable(words):
                words()
            else:
                sys.argv = ["bitalloy", *words]
                main()
            code = 0
        except BitalloyError as error:
            sys.stderr.write(f"Error: {error}\n")
            code = 2
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _spoiled(folder: Path) -> Iterator[str]:
    """Name the JSON files that hold NaN or an infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    for path in (folder / "run").glob("*.json") if (folder / "run").is_dir() else ():
        try:
            json.loads(path.read_text(), parse_constant=refuse)
        except ValueError:
            yield path.name


# -- models ------------------------------------------------------------------------------------------


def bases() -> dict[str, onnx.ModelProto]:
    """Small models of different kinds, each with one input `x` or two, `left` and `right`."""
    return {"two": two_inputs(), "net": _convolutions(), "text": _attention(), "head": _heads()}


def _convolutions() -> onnx.ModelProto:
    net = Network(4)
    x = net.silu(net.conv("x", 3, 4))
    x = net.op("Add", x, net.op("Relu", net.conv(x, 4, 4)))
    x = net.op("MaxPool", net.op("Concat", x, x, axis=1), kernel_shape=[2, 2], strides=[2, 2])
    scale = [net.constant(np.ones(8, np.float32)) for _ in range(4)]
    x = net.op("BatchNormalization", net.conv(x, 8, 8), *scale)
    x = net.op("Resize", x, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    x = net.op("Flatten", net.op("GlobalAveragePool", x), axis=1)
    return net.model({"x": (1, 3, 8, 8)}, {net.op("Softmax", net.gemm(x, 8, 4), axis=1): (1, 4)})


def _attention() -> onnx.ModelProto:
    net = Network(5)
    query, key, value = (net.op("MatMul", "x", net.weight(8, 8)) for _ in range(3))
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1]))
    mask = net.constant(np.triu(np.ones((6, 6), bool)))
    masked = net.op("Where", mask, scores, net.constant(np.array(-1e4, np.float32)))
    x = net.op("MatMul", net.op("Softmax", masked, axis=-1), value)
    x = net.op("LayerNormalization", x, net.weight(8), net.weight(8), axis=-1)
    x = net.op("Gather", x, net.constant(np.array([0, 2])), axis=1)
    x = net.op("Slice", x, *(net.constant(np.array([i])) for i in (0, 2, 1)))
    return net.model({"x": (1, 6, 8)}, {net.op("Erf", x): (1, 2, 8)})


def _heads() -> onnx.ModelProto:
    """Boxes and scores as a detector writes them, with all that bitalloy reads from metadata."""
    net = Network(6)
    x = net.silu(net.conv("x", 3, 4, stride=2))
    parts = []
    for rows in (4, 3):
        y = net.op("Reshape", net.op("Sigmoid", net.conv(x, 4, rows, kernel=1)), net.constant(np.array([1, rows, 16])))
        parts.append(net.op("Mul", y, net.constant(np.array(8.0, np.float32))) if rows == 4 else y)
    model = net.model({"x": (1, 3, 8, 8)}, {net.op("Concat", *parts, axis=1): (1, 7, 16)})
    facts = {
        "family": "yolo11",
        "variant": "yolo11n",
        "heads": json.dumps([model.graph.output[0].name]),
        "shapes": '{"x": [1, 3, 8, 8]}',
        "image": '{"scale": 0.00392, "mean": [0.0], "fit": "letterbox"}',
        "protect": '[{"pattern": "*Sigmoid", "reason": "it is small", "source": "nowhere"}]',
    }
    for key, value in facts.items():
        model.metadata_props.add(key=f"bitalloy.{key}", value=value)
    model.graph.node[0].metadata_props.add(key="bitalloy.region", value="neck/first")
    return model


def write_feeds(folder: Path) -> None:
    """Samples for each of the models, in a folder of its name."""
    for name, shapes in (
        ("two", {"left": (1, 16), "right": (1, 16)}),
        ("net", {"x": (1, 3, 8, 8)}),
        ("text", {"x": (1, 6, 8)}),
        ("head", {"x": (1, 3, 8, 8)}),
    ):
        save_feeds(folder / name, count=4, **shapes)


# -- mutations ---------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 65536, 2**31 - 1, -(2**31), 2**62, -(2**63), 2**63 - 1)
FLOATS = (0.0, -1.0, 1e-45, 1e38, -1e38, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "x", "a\x00b", "é", "n" * 5000, "../x", "[]", "{", "null", "[1]", '{"x": [1]}', "1e999", "NaN", "[" * 5000)


def mutated(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """A model after one to three mutations, as the bytes of its file."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 3)):
            _mutate_field(found, rng)
        return found.SerializeToString()
    data = bytearray(found.SerializeToString())
    for _ in range(rng.randint(1, 3)):
        mutate_bytes(data, rng)
    return bytes(data)


def mutate_bytes(data: bytearray, rng: random.Random) -> None:
    """Change, remove, repeat or insert some bytes."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 1, 1, 4, 64, len(data))))
    match rng.randrange(4):
        case 0:
            for at in range(start, stop):
                data[at] = rng.randrange(256)
        case 1:
            del data[start:stop]
        case 2:
            data[start:start] = data[start:stop]
        case 3:
            data[start:start] = bytes(rng.randrange(256) for _ in range(4))


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for inside in value if field.is_repeated else [value]:
                yield from _messages(inside)


def _mutate_field(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change a field of a message; each kind of message is as likely as any other, however many there are."""
    kinds: dict[str, list[Any]] = {}
    for message in _messages(model):
        kinds.setdefault(message.DESCRIPTOR.name, []).append(message)
    message = rng.choice(kinds[rng.choice(sorted(kinds))])
    fields = [f for f, _ in message.ListFields()] if rng.random() < 0.8 else list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    if not field.is_repeated:
        if field.type == Field.TYPE_MESSAGE or rng.random() < 0.15:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, _value(field, getattr(message, field.name), rng))
        return
    values = getattr(message, field.name)
    at = rng.randrange(len(values)) if values else 0
    match rng.randrange(5):
        case 0 if values:
            del values[at]
        case 1 if values:
            values.extend([values[at]])
        case 2 if len(values) > 1:
            other = rng.randrange(len(values))
            if field.type == Field.TYPE_MESSAGE:
                values[at].CopyFrom(values[other])
            else:
                values[at] = values[other]
        case 3:
            message.ClearField(field.name)
        case _ if field.type == Field.TYPE_MESSAGE:
            values.add()
        case _:
            found = _value(field, values[at] if values else None, rng)
            if values:
                values[at] = found
            else:
                values.append(found)


def _value(field: Any, now: Any, rng: random.Random) -> Any:
    match field.cpp_type:
        case Field.CPPTYPE_INT32:
            return max(min(rng.choice(NUMBERS), 2**31 - 1), -(2**31))
        case Field.CPPTYPE_INT64:
            return rng.choice(NUMBERS)
        case Field.CPPTYPE_UINT64:
            return abs(rng.choice(NUMBERS))
        case Field.CPPTYPE_FLOAT | Field.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case Field.CPPTYPE_ENUM:
            return rng.choice([v.number for v in field.enum_type.values])
        case _ if field.type == Field.TYPE_BYTES:
            return _bytes(bytes(now or b""), rng)
    return rng.choice(TEXTS)


def _bytes(now: bytes, rng: random.Random) -> bytes:
    match rng.randrange(5):
        case 0:
            return b""
        case 1:
            return now[: len(now) // 2]
        case 2:
            return now + now
        case 3:
            return bytes(len(now))
    return np.full(max(len(now) // 4, 1), rng.choice(FLOATS), np.float32).tobytes()


# -- cases -------------------------------------------------------------------------------------------


def file_case(index: int, seed: int, folder: Path, feeds: Path) -> list[str]:
    """Write a mutated model into a folder and give the command for it."""
    rng = random.Random(f"{seed} file {index}")
    name, model = rng.choice(sorted(bases().items()))
    if rng.random() < 0.15:
        onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w", size_threshold=64)
        model = onnx.load(folder / "model.onnx", load_external_data=False)
    (folder / "model.onnx").write_bytes(mutated(model, rng))
    command = "run" if index % RUNS == 0 else "sensitivity"
    return [command, "model.onnx", "--data", str(feeds / name), *QUICK, "--out", "run"]


def line_case(index: int, seed: int, folder: Path, feeds: Path) -> list[str]:
    """Put a sound model and its samples into a folder and give a command with absurd options."""
    rng = random.Random(f"{seed} line {index}")
    onnx.save(bases()["two"], folder / "two.onnx")
    shutil.copytree(feeds / "two", folder / "feeds")
    command = rng.choice(("run", "run", "run", "sensitivity", "sensitivity", "plan", "audit", "export"))
    subject = {"plan": "run", "audit": "run", "export": "yolo11n"}.get(command, "two.onnx")
    words = [command, subject if rng.random() < 0.9 else rng.choice(STRANGE)]
    if command in ("run", "sensitivity"):
        words += ["--data", "feeds", *QUICK, "--out", "run"]
    for _ in range(rng.randint(1, 3)):
        words += [rng.choice(OPTIONS[command]), rng.choice(STRANGE)]
    return words


def check(name: str, seed: int, feeds: Path) -> Outcome:
    """Run one case, by its name."""
    kind, _, index = name.partition("-")
    make = {"file": file_case, "line": line_case}[kind]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        return attempt(make(int(index), seed, Path(folder), feeds), Path(folder))


def faults(
    names: Sequence[str], seed: int, told: Callable[[str, Outcome], object] = lambda name, outcome: None
) -> dict[str, Outcome]:
    """Run cases, and give those that crashed, hung or wrote what is no number."""
    import bitalloy.pipeline.run
    import bitalloy.pipeline.sensitivity  # noqa: F401  imported once, for all children

    found = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-feeds-") as folder:
        write_feeds(Path(folder))
        gc.freeze()
        for name in names:
            outcome = check(name, seed, Path(folder))
            told(name, outcome)
            if outcome.fault:
                found[name] = outcome
    return found


def main() -> None:
    """Run the cases that are asked for, and fail where one is faulty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1200)
    parser.add_argument("--lines", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--show", action="store_true", help="print what each case printed")
    asked = parser.parse_args()
    names = [f"file-{i}" for i in range(asked.files)] + [f"line-{i}" for i in range(asked.lines)]
    codes: dict[int | None, int] = {}

    def tell(name: str, outcome: Outcome) -> None:
        codes[outcome.code] = codes.get(outcome.code, 0) + 1
        if asked.show or outcome.fault:
            print(
                f"-- {name}: {outcome.fault or outcome.code}, {outcome.seconds:.1f} s\n{outcome.text[-3000:]}",
                flush=True,
            )

    found = faults(asked.only or names, asked.seed, tell)
    print(f"{sum(codes.values())} cases, exit codes {codes}; faulty: {', '.join(found) or 'none'}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
