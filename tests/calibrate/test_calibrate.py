"""One streaming pass against a plain collection of everything."""

from __future__ import annotations

import doctest
import itertools
import math
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitalloy.calibrate import clipping, statistics, streaming
from bitalloy.calibrate.statistics import ARRAYS, BINS, METHODS, Statistics, observe
from bitalloy.calibrate.streaming import collect
from bitalloy.core.errors import BitalloyError, DataError, ModelError
from bitalloy.formats.affine import activation_params, fake_quantize
from bitalloy.ops import RISING

Feeds = list[dict[str, np.ndarray]]


def model(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from onnx.parser's text, shapes inferred; keyword arguments become initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in weights.items())
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


NET = model(
    """net (float[1,3,16,16] x) => (float[1,5] y) {
      c = Conv<pads = [1,1,1,1]>(x, w1)
      s = Sigmoid(c)
      m = Mul(c, s)
      d = Conv<pads = [1,1,1,1], strides = [2,2]>(m, w2)
      r = Relu(d)
      p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(r)
      f = Reshape(p, shape)
      t = Transpose<perm = [1,0]>(f)
      a = Concat<axis = 1>(f, f)
      g = MatMul(a, w3)
      h = Softmax(g)
      y = Add(h, b)
    }""",
    w1=np.random.default_rng(1).normal(size=(6, 3, 3, 3)).astype(np.float32),
    w2=np.random.default_rng(2).normal(size=(4, 6, 3, 3)).astype(np.float32),
    w3=np.random.default_rng(3).normal(size=(128, 5)).astype(np.float32),
    b=np.array([-1, 0, 1, 2, 3], np.float32),
    shape=np.array([1, 64], np.int64),
)
TENSORS = ("x", "c", "s", "m", "d", "r", "p", "f", "t", "a", "g", "h", "y")


def images(count: int, shape: tuple[int, ...] = (1, 3, 16, 16), seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    return [{"x": (rng.normal(size=shape) * (1 + i)).astype(np.float32)} for i in range(count)]


def everything(proto: onnx.ModelProto, tensors: Sequence[str], feeds: Feeds) -> dict[str, list[np.ndarray]]:
    """Oracle: all values of all tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    for name in tensors:
        copy.graph.node.add(op_type="Identity", input=[name], output=[f"{name}_out"])
        copy.graph.output.add(name=f"{name}_out").type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [session.run(None, feed) for feed in feeds]
    return {name: [run[i] for run in runs] for i, name in enumerate(tensors)}


def observed(values: Mapping[str, Sequence[np.ndarray]]) -> Statistics:
    """Statistics of given values, without a model: tensor -> array per sample."""
    total = None
    for vectors in zip(*values.values(), strict=True):
        flat = [np.ravel(v) for v in vectors]
        ends = np.array([(v.min(), v.max()) for v in flat], np.float64)
        seen = observe(tuple(values), [v.size for v in flat], ends, flat, total)
        total = seen if total is None else total.merge(seen)
    assert total is not None
    return total


class TestPass:
    def test_extremes_equal_a_full_collection(self) -> None:
        feeds = images(5)
        stats = collect(NET, TENSORS, feeds)
        assert stats.tensors == TENSORS
        assert stats.samples == 5
        for i, (name, arrays) in enumerate(everything(NET, TENSORS, feeds).items()):
            # the runtime fuses differently when other outputs are asked for: bits may differ where it sums
            tolerance = 0 if name == "x" else 1e-5
            np.testing.assert_allclose(stats.low[i], min(a.min() for a in arrays), rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(stats.high[i], max(a.max() for a in arrays), rtol=tolerance, atol=tolerance)

    def test_exact_where_the_arithmetic_is(self) -> None:
        proto = model(
            """net (float[1,3,64,64] x) => (float[1,3,32,32] y) {
              a = Mul(x, k)
              b = Add(a, x)
              r = Relu(b)
              n = Neg(b)
              y = MaxPool<kernel_shape = [2,2], strides = [2,2]>(n)
            }""",
            k=np.array([3.7], np.float32),
        )
        feeds = images(4, (1, 3, 64, 64))
        names = ("x", "a", "b", "r", "n", "y")
        stats = collect(proto, names, feeds)
        for i, arrays in enumerate(everything(proto, names, feeds).values()):
            assert stats.low[i] == min(a.min() for a in arrays)
            assert stats.high[i] == max(a.max() for a in arrays)

    def test_sums_counts_and_histogram_of_small_tensors_see_every_value(self) -> None:
        feeds = images(4)
        stats = collect(NET, TENSORS, feeds)
        for i, (name, arrays) in enumerate(everything(NET, TENSORS, feeds).items()):
            x = np.concatenate([a.ravel() for a in arrays]).astype(np.float64)
            assert stats.count[i] == x.size, name
            np.testing.assert_allclose(stats.total[i], x.sum(), rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(stats.squares[i], np.square(x).sum(), rtol=1e-4)
            width = 2.0 ** stats.exponent[i]
            edges = (stats.origin[i] + np.arange(BINS + 1)) * width
            assert edges[0] <= x.min()
            assert x.max() <= edges[-1]
            ours, reference = np.cumsum(stats.histogram[i]), np.cumsum(np.histogram(x, edges)[0])
            assert np.abs(ours - reference).max() <= 2, name  # last bits of sums on an edge
        assert stats.zeros[TENSORS.index("r")] == sum((a == 0).sum() for a in everything(NET, ("r",), feeds)["r"])

    def test_histograms_for_people_count_what_numpy_counts(self) -> None:
        feeds = images(3)
        values = everything(NET, TENSORS, feeds)
        for name, found in zip(TENSORS, collect(NET, TENSORS, feeds).histograms(), strict=True):
            flat = np.concatenate([v.ravel() for v in values[name]])
            edges = found.low + found.width * np.arange(len(found.counts) + 1)
            assert edges[0] <= flat.min() and flat.max() <= edges[-1], name
            assert found.counts == tuple(np.histogram(flat, edges)[0].tolist()), name
            assert found.counts[0] and found.counts[-1] and 8 <= len(found.counts) <= 65, name
            assert (found.low / found.width).is_integer(), "0 is an edge"

    def test_histograms_of_constants_and_of_nothing_but_zeros(self) -> None:
        stats = observed({"zero": [np.zeros(4, np.float32)], "three": [np.full(4, 3.0, np.float32)]})
        for found, value in zip(stats.histograms(), (0.0, 3.0), strict=True):
            assert found.counts == (4,) and found.low <= value <= found.low + found.width

    def test_large_tensors_leave_a_spread_sample(self) -> None:
        proto = model("net (float[1,8,40,40] x) => (float[1,8,40,40] y) { y = Neg(x) }")
        for axis in (1, 2, 3):
            coordinate = np.indices((1, 8, 40, 40))[axis].astype(np.float32)
            stats = collect(proto, ["x"], [{"x": coordinate}])
            assert stats.count[0] <= streaming.VALUES
            hit = np.flatnonzero(stats.histogram[0])
            assert hit.size == coordinate.max() + 1  # every channel, row and column
            counts = stats.histogram[0][hit]
            assert counts.max() - counts.min() <= 0.2 * counts.mean() + 2

    @pytest.mark.parametrize("size", [1, 2048, 2049, 4096, 6144, 6147, 10**6, 3 * 640 * 640, 2048 * 809, 9699690])
    def test_stride(self, size: int) -> None:
        step = streaming._stride(size)
        assert math.ceil(size / step) <= streaming.VALUES
        assert step == 1 or (size % step and all(step % d for d in range(2, step)))

    def test_model_is_not_changed_and_order_is_the_graphs(self) -> None:
        before = NET.SerializeToString()
        one = collect(NET, ["y", "c", "x", "c"], images(2))
        assert one.tensors == ("x", "c", "y")
        assert NET.SerializeToString() == before
        assert collect(before, one.tensors, images(2)).to_bytes() == one.to_bytes()

    def test_feeds_are_streamed_and_progress_told(self) -> None:
        events: list[str] = []

        def stream() -> Iterator[dict[str, np.ndarray]]:
            for feed in images(3):
                events.append("feed")
                yield feed

        collect(NET, ["c"], stream(), progress=lambda n: events.append(f"done {n}"))
        assert events == ["feed", "done 1"] * 3

    @pytest.mark.parametrize("opset", [10, 11, 13, 18, 21])
    def test_opsets(self, opset: int) -> None:
        proto = model("net (float[2,3000] x) => (float[2,3000] y) { y = Abs(x) }", opset)
        feeds = images(2, (2, 3000))
        found = collect(proto, ["x", "y"], feeds).ranges("minmax")
        every = np.concatenate([f["x"] for f in feeds])
        assert found["x"] == (every.min(), every.max())
        assert found["y"] == (np.abs(every).min(), np.abs(every).max())

    def test_scalars_and_weights(self) -> None:
        proto = model("net (float x) => (float[2] y) { y = Mul(x, k) }", k=np.array([2, -3], np.float32))
        found = collect(proto, ["x", "k", "y"], [{"x": np.array(2.5, np.float32)}]).ranges("minmax")
        assert found == {"x": (2.5, 2.5), "k": (-3.0, 2.0), "y": (-7.5, 5.0)}

    @pytest.mark.parametrize("op", sorted(RISING))
    def test_rising_functions(self, op: str) -> None:
        proto = model(f"net (float[50,100] x) => (float[50,100] y) {{ y = {op}(x) }}")
        low = 0.001 if op in ("Log", "Sqrt") else -7.0
        feeds = [{"x": np.random.default_rng(s).uniform(low, 5, (50, 100)).astype(np.float32)} for s in (0, 1)]
        stats = collect(proto, ["x", "y"], feeds)
        assert "y" in streaming._plan(proto, ["x", "y"]).derived
        arrays = everything(proto, ["y"], feeds)["y"]
        np.testing.assert_allclose(stats.low[1], min(a.min() for a in arrays), rtol=2e-6, atol=1e-30)
        np.testing.assert_allclose(stats.high[1], max(a.max() for a in arrays), rtol=2e-6)
        assert stats.count[0] == stats.count[1]
        alone = collect(proto, ["y"], feeds)
        np.testing.assert_allclose(alone.squares[0], stats.squares[1], rtol=1e-6)

    def test_memory_does_not_grow_with_the_data(self) -> None:
        def peak(count: int) -> int:
            stream = ({"x": np.full((1, 3, 16, 16), i, np.float32)} for i in range(count))
            tracemalloc.start()
            collect(NET, TENSORS, stream)
            top = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return top

        peak(2)
        assert peak(60) < 1.05 * peak(6)


class TestMasks:
    PROTO = model(
        """net (float[1,4,64] x, bool[1,4,64] keep) => (float[1,4,64] y) {
          s = Where(keep, x, low)
          t = Reshape(s, shape)
          y = Softmax(t)
        }""",
        low=np.array(-np.inf, np.float32),
        shape=np.array([1, 4, 64], np.int64),
    )

    def feeds(self) -> Feeds:
        rng = np.random.default_rng(3)
        return [
            {"x": rng.normal(size=(1, 4, 64)).astype(np.float32), "keep": rng.random((1, 4, 64)) > 0.5} for _ in "ab"
        ]

    def test_only_finite_numbers_count(self) -> None:
        feeds = self.feeds()
        found = collect(self.PROTO, ["s", "t", "y", "x"], feeds, masked=["s", "t"])
        at = {t: i for i, t in enumerate(found.tensors)}
        kept = [f["x"][f["keep"]] for f in feeds]
        for tensor in ("s", "t"):
            assert found.low[at[tensor]] == min(k.min() for k in kept)
            assert found.high[at[tensor]] == max(k.max() for k in kept)
            np.testing.assert_allclose(found.squares[at[tensor]], sum(np.square(k, dtype=float).sum() for k in kept))
        assert found.infinite.tolist() == [2 if t in "st" else 0 for t in found.tensors]
        assert Statistics.from_bytes(found.to_bytes()).infinite.tolist() == found.infinite.tolist()
        assert np.isfinite([found.low, found.high]).all()

    def test_infinity_elsewhere_and_nan_anywhere_are_refused(self) -> None:
        feeds = self.feeds()
        with pytest.raises(ModelError, match="'s' has NaN or infinite values in sample 0"):
            collect(self.PROTO, ["s"], feeds)
        feeds[1]["x"][0, 2, 5], feeds[1]["keep"][0, 2, 5] = np.nan, True
        with pytest.raises(ModelError, match=r"'s' has NaN .* sample 1"):
            collect(self.PROTO, ["s", "y"], feeds, masked=["s"])


class TestRefusals:
    def test_nan_in_the_input(self) -> None:
        feeds = images(3)
        feeds[2]["x"][0, 1, 3, 5] = np.nan
        with pytest.raises(ModelError, match=r"'x' has NaN or infinite values in sample 2\b"):
            collect(NET, TENSORS[::-1], feeds)
        with pytest.raises(ModelError, match=r"'c' has NaN .* sample 2"):
            collect(NET, [t for t in TENSORS[::-1] if t != "x"], feeds)

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    @pytest.mark.parametrize("place", [0, 1, 6143, 12287])
    def test_one_bad_value_anywhere(self, bad: float, place: int) -> None:
        proto = model("net (float[1,3,64,64] x) => (float[1,3,64,64] y) { y = Neg(x) }")
        feeds = images(2, (1, 3, 64, 64))
        feeds[1]["x"].flat[place] = bad
        for tensors in (["x"], ["x", "y"]):
            with pytest.raises(ModelError, match=r"'x' has NaN .* sample 1"):
                collect(proto, tensors, feeds)

    def test_made_inside_and_dropped_again(self) -> None:
        proto = model(
            """net (float[1,1,4,4] x) => (float[1,1,2,2] y) {
              l = Log(x)
              s = Add(l, l)
              p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(s)
              y = Relu(p)
            }"""
        )
        x = np.ones((1, 1, 4, 4), np.float32)
        x[0, 0, 1, 1] = -1
        for tensors, name in ((["y", "s", "l", "x"], "l"), (["y", "s"], "s"), (["l"], "l")):
            with pytest.raises(ModelError, match=f"'{name}' has NaN"):
                collect(proto, tensors, [{"x": x}])
        x[0, 0, 1, 1] = 0
        with pytest.raises(ModelError, match="'l' has NaN or infinite"):
            collect(proto, ["y", "s", "l"], [{"x": x}])

    def test_strided_convolution_does_not_hide_nan(self) -> None:
        proto = model(
            "net (float[1,1,5,5] x) => (float[1,1,3,3] y) { a = Neg(x) y = Conv<strides = [2,2]>(a, w) }",
            w=np.ones((1, 1, 1, 1), np.float32),
        )
        x = np.ones((1, 1, 5, 5), np.float32)
        x[0, 0, 1, 1] = np.nan  # falls between the steps
        with pytest.raises(ModelError, match="'a' has NaN"):
            collect(proto, ["a", "y"], [{"x": x}])

    def test_a_sum_that_overflows_is_no_error(self) -> None:
        proto = model("net (float[1,64] x) => (float[1,64] y) { y = Neg(x) }")
        stats = collect(proto, ["x", "y"], [{"x": np.full((1, 64), 3e38, np.float32)}])
        assert stats.high[0] == np.float32(3e38)

    def test_no_data(self) -> None:
        with pytest.raises(DataError, match="no sample"):
            collect(NET, TENSORS, [])

    @pytest.mark.parametrize("name", ["nothing", "shape", "free", "int", "empty"])
    def test_unusable_tensors(self, name: str) -> None:
        proto = model(
            """net (float[1,N] x, float[0,3] empty) => (float[1,N] y, int64[1,N] int) {
              free = Neg(x) y = Neg(free) int = Cast<to = 7>(x)
            }""",
            shape=np.array([1, 64], np.int64),
        )
        with pytest.raises(ModelError, match=f"'{name}' is no non-empty float32 tensor"):
            collect(proto, [name], images(1, (1, 8)))

    def test_no_tensor_and_old_opset(self) -> None:
        with pytest.raises(ModelError, match="no tensor"):
            collect(NET, [], images(1))
        with pytest.raises(ModelError, match="opset 10 or later, the model has 9"):
            collect(model("net (float[2] x) => (float[2] y) { y = Abs(x) }", 9), ["x"], images(1, (2,)))

    def test_feeds_that_do_not_fit(self) -> None:
        with pytest.raises(BitalloyError):
            collect(NET, ["x"], images(1, (1, 3, 8, 8)))

    def test_unknown_method(self) -> None:
        with pytest.raises(BitalloyError, match=r"'median'.*minmax, extended, moving, percentile, entropy, mse"):
            observed({"x": [np.array([1], np.float32)]}).ranges("median")


values = hnp.arrays(np.float32, st.integers(1, 12), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


class TestMerge:
    @given(samples=st.lists(st.tuples(values, values), min_size=1, max_size=6), cut=st.integers(0, 6))
    @settings(max_examples=200)
    def test_shards_equal_one_pass(self, samples: list[tuple[np.ndarray, np.ndarray]], cut: int) -> None:
        def of(part: Sequence[tuple[np.ndarray, np.ndarray]]) -> Statistics:
            return observed({"a": [s[0] for s in part], "b": [s[1] for s in part]})

        whole = of(samples)
        cut = min(cut, len(samples) - 1)
        shards = [of(p) for p in (samples[:cut], samples[cut:]) if p]
        orders = [shards, shards[::-1]]
        for order in orders:
            merged = order[0] if len(order) == 1 else order[0].merge(order[1])
            for name in ("low", "high", "exponent", "origin", "histogram", "zeros", "subnormal", "count"):
                np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), name)
            np.testing.assert_allclose(merged.total, whole.total, rtol=1e-9, atol=1e30)
        merged = shards[0] if len(shards) == 1 else shards[0].merge(shards[1])
        size = float(whole.magnitude.max())
        np.testing.assert_allclose(merged.moving_low, whole.moving_low, rtol=1e-9, atol=1e-9 * size)
        np.testing.assert_allclose(merged.moving_high, whole.moving_high, rtol=1e-9, atol=1e-9 * size)
        for i, x in enumerate([np.concatenate(c).astype(np.float64) for c in zip(*samples, strict=True)]):
            places = np.floor(x / 2.0 ** whole.exponent[i]) - whole.origin[i]
            assert places.min() >= 0
            assert places.max() < BINS
            np.testing.assert_array_equal(np.bincount(places.astype(int), minlength=BINS), whole.histogram[i])
            assert whole.zeros[i] == (x == 0).sum()

    @given(x=values)
    @settings(max_examples=200)
    def test_grid_is_the_finest_that_covers_the_range_and_zero(self, x: np.ndarray) -> None:
        stats = observed({"x": [x]})
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        width = 2.0 ** int(stats.exponent[0])
        assert stats.origin[0] == math.floor(low / width)
        assert math.floor(high / width) - stats.origin[0] < BINS
        if stats.exponent[0] > -149:
            assert math.floor(high / width * 2) - math.floor(low / width * 2) >= BINS

    def test_all_orders_of_three_passes(self) -> None:
        shards = [collect(NET, TENSORS, images(2, seed=s)) for s in range(3)]
        found = []
        for order in itertools.permutations(shards):
            merged = order[0].merge(order[1]).merge(order[2])
            found.append([getattr(merged, n).tobytes() for n in ("low", "high", "histogram", "exponent", "origin")])
            assert merged.samples == 6
        assert all(f == found[0] for f in found)

    def test_moving_average(self) -> None:
        feeds = images(6)
        low, high = collect(NET, ["x"], feeds).ranges("moving")["x"]
        expected = [float(feeds[0]["x"].min()), float(feeds[0]["x"].max())]
        for feed in feeds[1:]:
            expected = [
                0.9 * e + 0.1 * float(v) for e, v in zip(expected, (feed["x"].min(), feed["x"].max()), strict=True)
            ]
        np.testing.assert_allclose([low, high], expected, rtol=1e-12)

    def test_different_tensors(self) -> None:
        with pytest.raises(DataError, match="different tensors"):
            observed({"x": [np.array([1], np.float32)]}).merge(observed({"y": [np.array([1], np.float32)]}))


class TestStore:
    def test_round_trip(self) -> None:
        stats = collect(NET, TENSORS, images(3))
        data = stats.to_bytes()
        again = Statistics.from_bytes(data)
        assert again.to_bytes() == data
        assert (again.tensors, again.samples) == (stats.tensors, stats.samples)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(again, name), getattr(stats, name))
        for method in METHODS:
            assert again.ranges(method) == stats.ranges(method)
        assert again.merge(stats).samples == 6

    def test_damaged(self) -> None:
        data = observed({"x": [np.array([1, 2], np.float32)], "y": [np.array([1, 2], np.float32)]}).to_bytes()
        for broken in (b"", b"PK", data[:-30], data[:200] + bytes(20) + data[220:]):
            with pytest.raises(DataError, match="Calibrate again"):
                Statistics.from_bytes(broken)


RNG = np.random.default_rng(7)
SHAPES = {
    "normal": RNG.normal(size=12000),
    "laplace": RNG.laplace(size=12000),
    "heavy": RNG.standard_t(3, size=12000),
    "relu": np.maximum(RNG.normal(size=12000), 0),
    "silu": (lambda v: v / (1 + np.exp(-v)))(RNG.normal(size=12000) * 3),
    "uniform": RNG.uniform(-1, 2, size=12000),
    "pixels": RNG.integers(0, 256, size=12000) / 255,
    "outlier": np.append(RNG.normal(size=12000), 60.0),
    "negative": -np.abs(RNG.laplace(size=12000)),
    "offset": RNG.normal(10, 0.5, size=12000),
    "large": RNG.normal(size=12000) * 1e30,
}
DATA = {name: x.astype(np.float32) for name, x in SHAPES.items()}


@pytest.fixture(scope="module")
def stats() -> Statistics:
    return observed({name: np.array_split(x, 5) for name, x in DATA.items()})


def error_of(x: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of uint8 storage, every value rounded."""
    scale = np.abs(x).max().astype(np.float64)
    wide = fake_quantize(x, activation_params(low, high)).astype(np.float64)
    return float(np.square((wide - x) / scale).mean())


class TestRanges:
    @pytest.mark.parametrize("method", [m for m in METHODS if m != "extended"])
    def test_stay_inside_what_was_seen(self, stats: Statistics, method: str) -> None:
        for name, (low, high) in stats.ranges(method).items():
            assert min(DATA[name].min(), 0) <= low <= high <= max(DATA[name].max(), 0)

    @pytest.mark.parametrize("percentile", [99.999, 99.9, 99.0, 90.0, 50.0])
    def test_percentile_is_within_a_bin(self, stats: Statistics, percentile: float) -> None:
        found = stats.ranges("percentile", percentile=percentile)
        for i, (name, x) in enumerate(DATA.items()):
            ordered = np.sort(x).astype(np.float64)
            cut = (100 - percentile) / 200 * x.size
            skip = int(cut)
            width = 2.0 ** stats.exponent[i]
            expected = (ordered[skip], ordered[-1 - skip]) if cut >= 1 else (ordered[0], ordered[-1])
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=width, err_msg=name)

    def test_mse_is_never_worse_than_minmax_and_near_the_best(self, stats: Statistics) -> None:
        full, clipped = stats.ranges("minmax"), stats.ranges("mse")
        for name, x in DATA.items():
            x = x[x != 0]
            ours, theirs = error_of(x, *clipped[name]), error_of(x, *full[name])
            assert ours <= theirs * 1.001, name
            low, high = min(full[name][0], 0.0), max(full[name][1], 0.0)
            factors = 0.87 ** np.arange(20)
            best = min(
                error_of(x, low * a, high * b)
                for a in (factors if low < 0 else (1.0,))
                for b in (factors if high > 0 else (1.0,))
            )
            assert ours <= best * 1.05 + 1e-12, name
        assert all(clipped[name][1] < full[name][1] for name in ("normal", "laplace", "heavy"))
        assert clipped["uniform"] == full["uniform"]
        assert clipped["pixels"] == full["pixels"]

    def test_room_for_the_unseen_where_few_values_share_a_loss(self) -> None:
        """Pooled channels of samples whose brightness differs, judged by very many beyond the 64 of each draw."""
        rng = np.random.default_rng(5)

        def draw(samples: int) -> np.ndarray:
            return (rng.lognormal(0, 0.3, (samples, 1)) * np.abs(rng.normal(1, 0.3, 48))).astype(np.float32)

        fresh, factors = draw(20000), (0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 2.0)
        ours, fixed = [], dict[float, list[float]]((f, []) for f in factors)
        for _ in range(40):
            stats = observed({"x": list(draw(64))})
            (low, high), (_, extended) = stats.ranges("minmax")["x"], stats.ranges("extended")["x"]
            assert extended > high
            ours.append(error_of(fresh, low, extended))
            for factor, errors in fixed.items():
                errors.append(error_of(fresh, low, factor * high))
        means = {factor: float(np.mean(errors)) for factor, errors in fixed.items()}
        assert np.mean(ours) < 0.25 * means[1.0]
        assert np.mean(ours) < 3 * min(means.values()), "the best single factor in hindsight"

    def test_no_room_beyond_bounds_and_for_many_values(self) -> None:
        rng = np.random.default_rng(6)
        many = [rng.normal(0, rng.lognormal(0, 0.1), 40000).astype(np.float32) for _ in range(32)]
        gates = [np.append(rng.uniform(0, 1, 9), 1.0).astype(np.float32) for _ in range(32)]
        few = [rng.normal(0, rng.lognormal(0, 0.3), 10).astype(np.float32) for _ in range(32)]
        positive = [np.abs(v) for v in few]
        stats = observed({"many": many, "gates": gates, "few": few, "positive": positive})
        (low, high), (lowest, highest) = stats.ranges("extended")["few"], stats.ranges("minmax")["few"]
        assert low < lowest
        assert high > highest
        assert stats.ranges("extended")["positive"][0] == stats.ranges("minmax")["positive"][0]
        for name in ("many", "gates"):
            assert stats.ranges("extended")[name] == stats.ranges("minmax")[name]
        single = observed({"few": few[:1]})
        assert single.ranges("extended") == single.ranges("minmax"), "one sample tells nothing of others"

    def test_three_samples_already_tell_of_others(self) -> None:
        """What unseen samples lose is a fraction of what they lose where nothing is left for them."""
        rng, lost = np.random.default_rng(8), dict[str, list[float]](minmax=[], extended=[])
        for _ in range(60):
            values = (rng.lognormal(0, 0.3, (203, 1)) * rng.normal(1, 0.3, (203, 48))).astype(np.float32)
            stats = observed({"x": list(values[:3])})
            for method, errors in lost.items():
                errors.append(error_of(values[3:], *stats.ranges(method)["x"]))
        assert np.mean(lost["extended"]) < 0.3 * np.mean(lost["minmax"])

    def test_entropy_equals_the_slow_standard(self, stats: Statistics) -> None:
        found = stats.ranges("entropy")
        for i, (name, x) in enumerate(DATA.items()):
            width = 2.0 ** int(stats.exponent[i])
            places = np.floor(x[x != 0].astype(np.float64) / width).astype(int)
            counts = np.bincount(np.where(places < 0, -1 - places, places))
            candidates = [k for k in range(128, counts.size, 8) if counts[k:].sum() <= counts.sum() / 100]
            divergence = {k: slow_divergence(counts, k) for k in [*candidates, counts.size]}
            kept = clipping.entropy_threshold(counts)
            assert divergence[kept] <= min(divergence.values()) + 1e-12, name
            top = kept * width
            assert found[name] == (max(-top, min(float(x.min()), 0)), min(top, max(float(x.max()), 0))), name
        assert found["outlier"][1] < 10
        assert found["offset"][1] > 11

    def test_degenerate_tensors(self) -> None:
        flat = {
            "zero": np.zeros(50),
            "one": np.ones(50),
            "minus": -np.ones(50),
            "tiny": np.full(50, 1e-45),
            "two": np.array([0, 3] * 25, np.float32),
            "huge": np.array([-3.4e38, 3.4e38] * 25, np.float32),
        }
        stats = observed({k: [v.astype(np.float32)] * 2 for k, v in flat.items()})
        for method in METHODS:
            for name, (low, high) in stats.ranges(method).items():
                assert low <= high
                fake_quantize(np.array([0], np.float32), activation_params(low, high))
                if name in ("zero", "one", "minus", "two") and method != "moving":
                    x = flat[name].astype(np.float32)
                    scale = float(activation_params(float(x.min()), float(x.max())).scale)
                    kept = fake_quantize(x, activation_params(low, high))
                    np.testing.assert_allclose(kept, x, rtol=0, atol=scale, err_msg=f"{name} {method}")


def slow_divergence(counts: np.ndarray, keep: int, levels: int = 128) -> float:
    """KL(P || Q) of keeping `keep` bins, value by value as in the published pseudo-code."""
    p = [float(c) for c in counts[:keep]]
    beyond = float(counts[keep:].sum())
    p[-1] += beyond
    groups: list[list[int]] = [[] for _ in range(levels)]
    for j in range(keep):
        groups[j * levels // keep].append(j)
    q = [0.0] * keep
    for group in groups:
        filled = [j for j in group if p[j] > 0]
        total = float(counts[group].sum())
        for j in filled:
            q[j] = total / len(filled) if total else 1e-4
    norm = float(counts[:keep].sum()) or 1e-4
    every = sum(p)
    return sum(a / every * math.log((a / every) / (b / norm)) for a, b in zip(p, q, strict=True) if a > 0)


class TestHalf:
    def test_margin(self) -> None:
        assert (
            observed({"a": [np.array([2, -131008], np.float32)], "b": [np.array([1, 5], np.float32)]}).half_margin
            == 0.5
        )
        assert observed({"a": [np.zeros(3, np.float32)]}).half_margin == math.inf

    def test_share_of_subnormals(self) -> None:
        stats = observed({"a": [np.array([0, 0, 6e-5, -1e-9, 6.2e-5, 1], np.float32)], "z": [np.zeros(6, np.float32)]})
        assert stats.half_subnormal == {"a": 0.5, "z": 0.0}


@pytest.mark.parametrize("module", [clipping, statistics, streaming])
def test_docstring_examples(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
