"""How weights are stored, by hand: which axis is summed over, which neighbours are added, and what a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from tests.cnn import Case

from bitalloy.core.jobs import Contexts, Resident
from bitalloy.core.records import Record
from bitalloy.core.schemes import BASELINE, Granularity, Scheme
from bitalloy.core.store import key_of
from bitalloy.core.units import Offset, WeightSite
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.pairs import Channels, channels_of, largest_pairs
from bitalloy.targets.recipe import RecipeData, open_recipe, recipe_opening, reduction_axis, stored_weight


def node(operator: str, weight: np.ndarray, group: int | None = None) -> ir.Node:
    """An operator whose second input is a constant."""
    value = ir.Value(name="w", const_value=ir.tensor(weight.astype(np.float32)))
    return ir.node(operator, [ir.Value(name="x"), value], {} if group is None else {"group": group})


def scheme(granularity: str, *, block: int = 0, pair_limit: int | None = None) -> Scheme:
    kind = Granularity(granularity)
    return Scheme(name="s", activation="uint8", weight="int8", granularity=kind, block=block, pair_limit=pair_limit)


def stored(weight: np.ndarray, axis: int, how: Scheme, operator: str = "MatMul", group: int | None = None):
    site = WeightSite(tensor="w", node="n", slot=1, axis=axis, elements=weight.size)
    found = stored_weight(how, node(operator, weight, group), site)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("operator", "shape", "group", "channels"),
    [
        ("Conv", (8, 4, 3, 3), None, Channels.DENSE), ("Conv", (8, 2, 3, 3), 8, Channels.DENSE),
        ("Conv", (8, 1, 3, 3), 8, Channels.DEPTHWISE), ("Conv", (8, 1, 3, 3), 4, Channels.MULTIPLIER),
        ("Conv", (8, 1, 3), 1, Channels.GREY), ("Conv", (8, 1, 3), None, Channels.GREY),
        ("Conv", (1, 1, 3), None, Channels.DEPTHWISE), ("Conv", (4, 8, 1), 1, Channels.DENSE),
        ("MatMul", (8, 1), None, Channels.DENSE), ("Gemm", (4, 1), None, Channels.DENSE),
        ("ConvTranspose", (8, 1, 3, 3), 8, Channels.DENSE),
    ],
)  # fmt: skip
def test_channels_of_a_group(operator: str, shape: Sequence[int], group: int | None, channels: Channels) -> None:
    weight = np.zeros(shape)
    assert channels_of(node(operator, weight, group), weight.shape) is channels


def test_neighbours_of_a_matrix_lie_along_the_sum() -> None:
    weight = np.array([[1.0, -5.0], [-2.0, 0.5], [4.0, 3.0]])  # columns 1 2 4 and 5 0.5 3
    assert largest_pairs(node("MatMul", weight), weight, 1).tolist() == [6.0, 5.5]
    assert largest_pairs(node("MatMul", weight), weight, 0).tolist() == [6.0, 2.5, 7.0]
    assert largest_pairs(node("Gemm", weight), weight, 1).tolist() == [6.0, 5.5]
    assert largest_pairs(node("MatMul", weight[:1]), weight[:1], 1).tolist() == [0.0, 0.0]


def test_neighbours_of_a_convolution_lie_in_the_kernel_or_in_the_channels() -> None:
    """(channel, kernel) is 1 2 3 7 5 6, with at most 7 + 5; (kernel, channel) is 1 7 2 5 3 6, with at most 7 + 2."""
    weight = np.array([[[1.0, 2.0, -3.0], [7.0, 5.0, 6.0]]])
    assert largest_pairs(node("Conv", weight), weight, 0).tolist() == [12.0]
    weight = np.array([[[1.0, 9.0, 1.0], [2.0, 8.0, 1.0]]])
    assert largest_pairs(node("Conv", weight), weight, 0).tolist() == [17.0]
    flat = weight[:, :, None]
    assert largest_pairs(node("Conv", flat), flat, 0).tolist() == [17.0]
    turned = weight.transpose(1, 0, 2)
    assert largest_pairs(node("ConvTranspose", turned), turned, 1).tolist() == [17.0]
    assert largest_pairs(node("Unknown", weight), weight, 0).tolist() == [17.0]


def test_depthwise_kernels_add_no_pairs() -> None:
    weight = np.ones((4, 1, 3, 3), np.float32)
    for group, expected in ((4, 0.0), (2, 2.0), (1, 2.0)):
        found = largest_pairs(node("Conv", weight, group), weight, 0)
        assert found.tolist() == [expected] * 4 and found.dtype == np.float32


@pytest.mark.parametrize(
    ("operator", "channels", "rank", "axis"),
    [("MatMul", 1, 2, 0), ("Gemm", 0, 2, 1), ("Gemm", -1, 2, 0), ("Gemm", -2, 2, 1), ("Conv", 0, 4, 1),
     ("Conv", 0, 3, 1), ("ConvTranspose", 1, 4, 0), ("ConvTranspose", 1, 3, 0), ("MatMul", -1, 3, 1),
     ("MatMul", 2, 3, 1)],
)  # fmt: skip
def test_the_axis_that_is_summed_over(operator: str, channels: int, rank: int, axis: int) -> None:
    assert reduction_axis(node(operator, np.zeros((1,) * rank)), channels, rank) == axis


def test_scales_by_channel_tensor_and_block() -> None:
    weight = np.array([[1.0, -254.0], [-127.0, 12.7], [63.5, 2.54]], np.float32)
    by_channel = stored(weight, 1, scheme("channel"))
    np.testing.assert_allclose(by_channel.scale, [1.0, 2.0])
    assert (by_channel.axis, by_channel.block, by_channel.qmin, by_channel.qmax) == (1, 0, -127, 127)
    np.testing.assert_allclose(stored(weight, 0, scheme("channel"), "Gemm").scale, [2.0, 1.0, 0.5])
    np.testing.assert_allclose(stored(weight, 1, scheme("tensor")).scale, [2.0, 2.0])
    np.testing.assert_allclose(stored(weight / 1000, 1, scheme("tensor")).scale, [0.002, 0.002])
    blocks = stored(weight, 1, scheme("block", block=2))
    np.testing.assert_allclose(blocks.scale, [[1.0, 2.0], [0.5, 0.02]], rtol=1e-6)
    assert (blocks.axis, blocks.block) == (0, 2)
    across = stored(weight, 0, scheme("block", block=2), "Gemm")
    np.testing.assert_allclose(across.scale, [[2.0], [1.0], [0.5]], rtol=1e-6)
    assert across.axis == 1


def test_a_limit_raises_the_scale_of_a_channel_with_large_neighbours() -> None:
    """Two neighbours are at most limit - 1 steps together: half a step each is left for rounding."""
    weight = np.array([[127.0, 63.5], [127.0, 1.0], [0.0, 1.0]], np.float32)
    limited = stored(weight, 1, scheme("channel", pair_limit=128)).scale
    np.testing.assert_allclose(limited, [254 / 127, 0.5 * 129 / 127], rtol=1e-6)
    np.testing.assert_allclose(stored(weight, 1, scheme("channel", pair_limit=101)).scale, [2.54, 0.645], rtol=1e-6)
    np.testing.assert_allclose(stored(weight, 1, scheme("tensor", pair_limit=128)).scale, [2.0, 2.0], rtol=1e-6)


def test_a_recipe_is_made_again_from_its_data(case: Case) -> None:
    recipe = case.recipe(offsets={"site": Offset(node="n", values=(0.5,))})
    opening = recipe_opening(recipe)
    assert opening.kind == "recipe" and isinstance(opening.spec, RecipeData)
    again = open_recipe(opening.spec, Contexts())
    assert (again.units, again.target, again.offsets) == (recipe.units, ORT_CPU, recipe.offsets)
    assert dict(again.ranges) == dict(recipe.ranges)


def test_a_target_without_a_name_stays_in_the_process(case: Case) -> None:
    other = replace(ORT_CPU, describe="another")
    opening = recipe_opening(case.recipe(other))
    assert opening.kind == "resident" and isinstance(opening.spec, Resident)
    assert opening.spec.what == "the target 'ort-cpu'"
    assert isinstance(recipe_opening(case.recipe()).spec, Record)
    assert opening.spec.key == key_of(recipe_opening(case.recipe()).spec)


def test_parameters_follow_ranges_and_schemes(case: Case) -> None:
    recipe = case.recipe()
    tensor = next(t for t, (low, high) in recipe.ranges.items() if low < 0 < high)
    low, high = recipe.ranges[tensor]
    found, params = recipe.tensor_params("int8", tensor)
    assert found.name == "uint8" and params is not None
    assert float(params.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    unit = next(u for u in case.units.units if u.weights)
    site = unit.weights[0]
    stored_as = recipe.weight("int8", case.graph.node[site.node], site)
    assert stored_as.format.name == "int8" and stored_as.params is not None and stored_as.params.axis == site.axis


def test_the_opset_is_that_of_the_schemes_in_use(case: Case) -> None:
    recipe = case.recipe()
    assert recipe.opset == 13
    four = Scheme(name="int4", activation="uint8", weight="int4")
    with_four = msgspec.structs.replace(recipe.units, schemes=(*recipe.units.schemes, four))
    assert replace(recipe, units=with_four).opset == 13
    units = tuple(msgspec.structs.replace(u, allowed=(*u.allowed, "int4")) for u in with_four.units)
    assert replace(recipe, units=msgspec.structs.replace(with_four, units=units)).opset == 21
    floats = tuple(msgspec.structs.replace(u, allowed=(BASELINE,)) for u in recipe.units.units)
    assert replace(recipe, units=msgspec.structs.replace(recipe.units, units=floats)).opset == 0
