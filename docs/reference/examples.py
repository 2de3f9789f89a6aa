"""Examples of the public names for the page of the Python reference, each behind a line `# %%` with its names.

They go on from one to the next, and a test runs them in this order.
"""

# %%
from pathlib import Path

import numpy as np
import onnx

import bitalloy

Path("model.onnx").write_bytes(
    onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 17]>
three_layers (float[1, 32] x) => (float[1, 4] y) <float[32, 512] w1, float[512, 512] w2, float[512, 4] w3> {
  a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  d = Relu(c)  y = MatMul(d, w3)
}""").SerializeToString()
)
rng = np.random.default_rng(0)
model = onnx.load("model.onnx")
for name, shape in {"w1": (32, 512), "w2": (512, 512), "w3": (512, 4)}.items():
    values = rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
onnx.save(model, "model.onnx")
samples = rng.normal(size=(48, 1, 32)).astype(np.float32)

# %% load
graph = bitalloy.load("model.onnx")
print(graph.info.parameters)  # 32 x 512 + 512 x 512 + 512 x 4

# %% open_data
data = bitalloy.open_data(graph, list(samples), limit=32)
print(len(data), data.feeds(0)["x"].shape)

# %% Settings
settings = bitalloy.Settings(samples=8, probes=2, calibration_samples=16, seed=1)

# %% analyze, Analysis
analysis = bitalloy.analyze(graph, data, settings)
for row in analysis.table.rows:
    if row.scope == "unit":
        print(row.id, row.head, round(row.sqnr_db.value, 1))

# %% confirm
confirmed = bitalloy.confirm(analysis, worst=1, samples=4)
print([row.id for row in confirmed.table.rows if row.exact])

# %% calibrate, Calibrated
ready = bitalloy.calibrate(graph, data, settings)
print(ready.target.name, [unit.id for unit in ready.units.units])

# %% measure_exact, Selection
chosen = bitalloy.Selection(units=("*",))
table = bitalloy.measure_exact(ready, chosen, mode="leave-one-out", samples=4)
print([(row.id, round(row.sqnr_db.value, 1)) for row in table.rows])

# %% measure_cost
cost = bitalloy.measure_cost(analysis)
print({unit.unit: unit.us for unit in cost.units})

# %% Budget
print(bitalloy.Budget(latency="0.7x").latency_ratio, bitalloy.Budget(latency="12ms").latency_ms)
budget = bitalloy.Budget(min_sqnr_db=20)

# %% plan, Planned
planned = bitalloy.plan(analysis, budget, table=cost)
print(planned.plan.chosen, round(planned.predicted_ratio, 2))

# %% Plan
plan = bitalloy.Plan({"conv1": "int8", "conv2": "fp32", "head": "fp16"})
print(plan["conv1"], plan.counts())  # what stays in fp32 is not counted

# %% Keep
first = next(unit.id for unit in analysis.units.units)
kept = bitalloy.plan(analysis, bitalloy.Budget(min_sqnr_db=20, keep=(bitalloy.Keep(scheme="fp32", pattern=first),)))
print(kept.plan.chosen)

# %% apply
artefact = bitalloy.apply(analysis, planned)
artefact.save("applied.onnx")
onnx.checker.check_model("applied.onnx")

# %% verify, Verified
verified = bitalloy.verify(analysis, planned)
verified.mixed.save("mixed.onnx")
print(verified.summary.headline)

# %% Summary
summary = verified.summary
print(summary.latency_ratio, summary.size_bytes.mixed, summary.sqnr_db["y"].mixed.measured)

# %% Status, LimitStatus
print(verified.status.verdict)
for limit in verified.status.limits:
    print(limit.name, limit.asked, limit.got, limit.verdict)

# %% report
Path("report.html").write_text(bitalloy.report(verified))

# %% publish, RunDirectory
store = bitalloy.RunDirectory("runs/by-hand")
print(bitalloy.publish(verified, store))

# %% Workspace
work = bitalloy.Workspace(store=bitalloy.RunDirectory("runs/kept"))
again = bitalloy.analyze(graph, data, settings, work=work)  # where this was done before, it is read from there
print(work.seconds)

# %% run, RunOptions
options = bitalloy.RunOptions(shapes={"x": (1, 32)})
verified = bitalloy.run("model.onnx", out="runs/first", data=samples, budget=budget, options=options)
print(sorted(path.name for path in Path("runs/first").iterdir() if path.is_file()))

# %% quantize
verified = bitalloy.quantize("model.onnx", samples, budget=budget, out="runs/second")
print(verified.summary.headline)

# %% plan_again
replanned = bitalloy.plan_again("runs/first", bitalloy.Budget(min_sqnr_db=30))
print(replanned.plan.chosen)

# %% check, CheckedRun
checked = bitalloy.check("runs/first", budget=budget)
print(checked.passed, checked.reason)

# %% diff, RunDifference
difference = bitalloy.diff("runs/first", "runs/second")
print(difference.same_model, [number.name for number in difference.numbers])

# %% write_report
print(bitalloy.write_report(["runs/first", "runs/second"], out="compare.html"))


# %% Metric
def largest(outputs, label):
    """Whether the largest of the outputs of one sample is the right one."""
    return (outputs.argmax(1) == label).mean()


metric = bitalloy.Metric(largest, [(sample, 0) for sample in samples[:16]])
print(metric.title, metric.higher_is_better)

# %% evaluate
(result,) = bitalloy.evaluate(["model.onnx", "mixed.onnx"], metric)
for found in result.metrics:
    print(found.name, {name: value.value for name, value in found.values.items()})


# %% OwnSession
def spread(session: bitalloy.OwnSession) -> float:
    """The metric of a whole model: it is used as an `onnxruntime.InferenceSession`."""
    (given,) = session.get_inputs()
    return float(np.std([session.run(None, {given.name: sample})[0] for sample in samples[:4]]))


(result,) = bitalloy.evaluate(["model.onnx", "mixed.onnx"], spread)
print(result.metrics[0].name)

# %% Workload
answer = bitalloy.Settings(workload=bitalloy.Workload(prompt=256, new=64))  # of language models

# %% read_study
Path("study.toml").write_text("""
targets = ["ort-cpu"]
effort = "quick"

[budget.faithful]
min-sqnr-db = 20

[[model]]
model = "model.onnx"
data = "feeds"
""")
Path("feeds").mkdir()
for number, sample in enumerate(samples):
    np.savez(f"feeds/{number:02}.npz", x=sample)
asked = bitalloy.read_study("study.toml")
print(asked.targets, asked.cells)

# %% study, StudyResult
result = bitalloy.study(asked, out="runs/study")
print([cell.status for cell in result.cells], len(result.parts))

# %% BitalloyError, ModelError
try:
    bitalloy.load("no-such-model.onnx")
except bitalloy.ModelError as error:
    assert isinstance(error, bitalloy.BitalloyError)  # as all errors that are the user's to solve
    print(error)

# %% DataError
try:
    bitalloy.open_data(graph, np.zeros((4, 31), np.float32))
except bitalloy.DataError as error:
    print(error)

# %% BudgetError
try:
    bitalloy.Budget(latency="fast")
except bitalloy.BudgetError as error:
    print(error)

# %% RunDirectoryError
try:
    bitalloy.check("feeds")
except bitalloy.RunDirectoryError as error:
    print(error)

# %% UnreachableError
try:
    bitalloy.plan(analysis, bitalloy.Budget(min_sqnr_db=20, size_bytes=100))
except bitalloy.UnreachableError as error:
    print(error)
