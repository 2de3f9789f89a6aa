"""What starting costs, told by what is imported and not by a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import bitalloy

SLOW = frozenset({"msgspec", "numpy", "onnx", "onnx_ir", "onnxruntime", "pydantic", "rich", "scipy", "sympy"})
COMMAND = "import sys; sys.argv[1:] = {words}\nfrom bitalloy.cli.main import main\n"
TOLD = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted({m.partition(".")[0] for m in sys.modules})), file=sys.stderr))
"""


def started(code: str) -> tuple[int, str, str, set[str]]:
    """Exit code, standard output and error of a fresh interpreter, and the packages that it had imported in the end."""
    done = subprocess.run([sys.executable, "-c", TOLD + code], capture_output=True, text=True, timeout=120, check=False)
    *shown, packages = done.stderr.splitlines()
    return done.returncode, done.stdout, "\n".join(shown), set(json.loads(packages))


def command(*words: str) -> tuple[int, str, str, set[str]]:
    return started(COMMAND.format(words=list(words)) + "main()")


def test_importing_the_package_imports_nothing_else() -> None:
    code, _, _, packages = started("import bitalloy")
    assert code == 0
    assert packages - set(sys.stdlib_module_names) <= {"bitalloy", "__main__"} | started("pass")[3]


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("sensitivity", "--help"), ("plan", "--help")])
def test_help_imports_nothing_slow(words: tuple[str, ...]) -> None:
    code, out, _, packages = command(*words)
    assert code == 0 and "Usage" in out
    assert not packages & SLOW


def test_version_is_printed() -> None:
    code, out, _, packages = command("--version")
    assert (code, out) == (0, f"bitalloy {bitalloy.__version__}\n")
    assert not packages & SLOW


@pytest.mark.parametrize("words", [("run", "--budget", "5"), ("run", "--probes", "0"), ("runs",), ("--verbose",)])
def test_a_wrong_option_is_refused_without_anything_slow(words: tuple[str, ...]) -> None:
    code, out, err, packages = command(*words)
    assert code == 2 and "Error" in err and not out
    assert not packages & (SLOW - {"pydantic"} if words[-1] == "0" else SLOW)


@pytest.mark.parametrize("words", [("--latency", "soon"), ("--fit", "squeeze"), ("--shape", "x"), ("--samples", "0")])
def test_so_is_a_wrong_value(words: tuple[str, ...]) -> None:
    code, _, err, packages = command("run", *words)
    assert code == 2 and words[0] in err
    assert not packages & (SLOW - {"msgspec", "pydantic", "rich"})


@pytest.mark.parametrize("name", ["run", "sensitivity"])
def test_a_file_that_is_no_model_is_refused_before_the_pipeline_is_imported(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    code, _, err, packages = command(name, str(path))
    assert code == 2 and "No model file" in err
    path.write_text("not a model\n" * 100)
    code, _, err, packages = command(name, str(path))
    assert code == 2 and "not an ONNX file" in err
    assert not packages & {"onnx_ir", "onnxruntime", "scipy", "sympy"}


def test_every_public_name_is_loaded_on_first_use() -> None:
    code, _, err, _ = started("import bitalloy\nfor name in bitalloy.__all__: getattr(bitalloy, name)")
    assert code == 0, err
    assert set(bitalloy.__all__) <= set(dir(bitalloy))
    with pytest.raises(AttributeError, match="no attribute 'verity'"):
        _ = bitalloy.verity


@pytest.mark.parametrize("name", ["calibrate", "report", "verify"])
@pytest.mark.parametrize("first", ["package", "function"])
def test_functions_keep_their_names_beside_packages(name: str, first: str) -> None:
    """Whichever is imported first, `bitalloy.verify` is the function, and `bitalloy/verify/` can be imported."""
    steps = [f"import bitalloy.{name}", f"bitalloy.{name}.__call__"]
    steps = steps if first == "package" else steps[::-1]
    told = f"print(bitalloy.{name}.__module__, sys.modules['bitalloy.{name}'].__name__)"
    code, out, err, _ = started("\n".join(["import sys, bitalloy", *steps, f"from bitalloy import {name}", told]))
    assert code == 0, err
    assert out.split()[0].startswith("bitalloy.pipeline.") and out.split()[1] == f"bitalloy.{name}"


@pytest.mark.parametrize(
    ("domain", "key", "told"), [("my.ops", "x", "Operator domain 'my.ops'"), ("", "z", "expected the model's inputs")]
)
def test_what_cannot_be_taken_is_refused_before_measurement_is_imported(
    domain: str, key: str, told: str, tmp_path: Path
) -> None:
    shape = [1, 4]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"], domain=domain)], "g", [x], [y])
    imports = [onnx.helper.make_opsetid("", 17), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", **{key: np.zeros(shape, np.float32)})  # type: ignore[arg-type]
    words = str(tmp_path / "model.onnx"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")
    code, _, err, packages = command("run", *words)
    assert code == 2 and told in " ".join(err.split())
    assert not packages & {"scipy", "jinja2"}
