"""Small graphs, one for each numbered case of a target, and the text of what becomes of them.

A case is a graph in ONNX's text form; inputs called w... are random constants. Ranges are those of one random sample,
to three digits. Everything runs in the lowest precision that it may take, but for the cases in `PLANS`. Nothing in a
text depends on the processor that it is made on: `PAIR_LIMIT` stands for what a target would read from it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tests.cnn import int8, with_pair_limit

from bitalloy.calibrate.streaming import collect
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.metadata import TAG
from bitalloy.model.read import constant
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.sums import halve_sums
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.targets import target
from bitalloy.targets.base import Target, split
from bitalloy.targets.recipe import Recipe

RESIDUAL = """(float[1,3,8,8] x, float[4,3,3,3] w1, float[4,4,3,3] w2, float[4,4,3,3] w3) => (float[1,4,8,8] y) {
    c = Conv<pads=[1,1,1,1]>(x, w1)  r = Relu(c)  d = Conv<pads=[1,1,1,1]>(r, w2)  a = Add(d, r)  s = Relu(a)
    y = Conv<pads=[1,1,1,1]>(s, w3) }"""
CONCAT = """(float[1,3,8,8] x, float[4,3,3,3] w1, float[4,3,3,3] w2, float[4,8,3,3] w3) => (float[1,4,4,4] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1)  b = Conv<pads=[1,1,1,1]>(x, w2)  k = Concat<axis=1>(a, b)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(k)  y = Conv<pads=[1,1,1,1]>(m, w3) }"""
CASES: dict[str, dict[str, str]] = {
    "ort-cpu": {
        "case1-conv": """(float[1,8,16,16] x, float[8,8,3,3] w1, float[8] w2, float[8,8,3,3] w3)
            => (float[1,8,16,16] y) { c = Conv<pads=[1,1,1,1]>(x, w1, w2)  r = Relu(c)
            d = Conv<pads=[1,1,1,1]>(r, w3)  y = Neg(d) }""",
        "case2-products": """(float[4,32] x, float[32,16] w1, float[8,16] w2, float[8] w3) => (float[4,8] y) {
            m = MatMul(x, w1)  g = Gemm<transB=1>(m, w2, w3)  y = Neg(g) }""",
        "case2-constants": """(float[3,32,16] x, float[24,32] w1, float[3,16,8] w2, float[3,5,24] w3)
            => (float[3,5,8] y) { l = MatMul(w1, x)  r = MatMul(l, w2)  y = MatMul(w3, r) }""",
        "case3-silu": """(float[1,8,16,16] x, float[8,8,1,1] w1) => (float[1,8,16,16] y) {
            c = Conv(x, w1)  s = Sigmoid(c)  m = Mul(c, s)  y = Neg(m) }""",
        "case4-kernels": """(float[1,8,16,16] x, float[8,8,1,1] w1) => (float[1,16,8,8] y) {
            c = Conv(x, w1)  a = Add(c, x)  k = Concat<axis=1>(a, c)
            p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(k)  y = Neg(p) }""",
        "case5-movers": """(float[1,8,16,16] x, float[8,8,1,1] w1, float[8,8,1,1] w2) => (float[1,8,8,8] y) {
            c = Conv(x, w1)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)  t = Transpose<perm=[0,1,3,2]>(p)
            d = Conv(t, w2)  y = Neg(d) }""",
        "case6-average-pool": """(float[1,8,16,16] x, float[8,8,1,1] w1) => (float[1,8,8,8] y) {
            c = Conv(x, w1)
            p = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1>(c)  y = Neg(p) }""",
        "case7-stored-products": """(float[4,40] x, float[40,16] w1, float[8,16] w2, float[8] w3, float[8,16] w4)
            => (float[4,16] y) { m = MatMul(x, w1)  g = Gemm<transB=1>(m, w2, w3)  y = MatMul(g, w4) }""",
        "case8-float": """(float[1,8,16,16] x, float[8,8,1,1] w1, float[8,8,1,1] w2) => (float[1,8,16,16] y) {
            c = Conv(x, w1)  e = Exp(c)  d = Conv(e, w2)  y = Neg(d) }""",
        "case9-tables": """(int64[2,3] i, float[128,40] w1, float[256,40] w2, float[256,40] w3, float[16,40] w4)
            => (float[2,3,40] y) { a = Gather(w1, i)  b = Gather(w2, i)  c = Gather(w3, i)  d = Gather(w4, i)
            e = Add(a, b)  f = Add(c, d)  y = Add(e, f) }""",
    },
    "openvino-cpu": {
        "case1-conv": """(float[1,8,16,16] x, float[8,1,3,3] w1, float[8] w2, float[8,8,3,3] w3)
            => (float[1,8,16,16] y) { c = Conv<pads=[1,1,1,1], group=8>(x, w1, w2)  s = Sigmoid(c)  m = Mul(c, s)
            d = Conv<pads=[1,1,1,1]>(m, w3)  y = Relu(d) }""",
        "case2-products": """(float[1,64,32] x, float[32,16] w1, float[16] w2, float[16,8] w3) => (float[1,64,8] y) {
            m = MatMul(x, w1)  a = Add(m, w2)  g = Gelu(a)  y = MatMul(g, w3) }""",
        "case2-gemm": """(float[1,32] x, float[32,16] w1, float[16] w2, float[8,16] w3) => (float[1,8] y) {
            g = Gemm(x, w1, w2)  r = Relu(g)  y = Gemm<transB=1>(r, w3) }""",
        "case2-matrices": """(float[3,32,16] x, float[3,16,8] w1, float[2,32] w2) => (float[3,2,8] y) {
            m = MatMul(x, w1)  y = MatMul(w2, m) }""",
        "case3-concat": """(float[1,8,16,16] x, float[8,8,1,1] w1, float[8,8,1,1] w2, float[4,16,1,1] w3)
            => (float[1,4,16,16] y) { a = Conv(x, w1)  b = Conv(x, w2)  k = Concat<axis=1>(a, b)  y = Conv(k, w3) }""",
        "case4-concat-rows": """(float[1,64,32] x, float[32,16] w1, float[32,16] w2, float[16,8] w3)
            => (float[1,128,8] y) { a = MatMul(x, w1)  b = MatMul(x, w2)  k = Concat<axis=1>(a, b)
            y = MatMul(k, w3) }""",
        "case5-followers": """(float[1,8,16,16] x, float[8,8,1,1] w1, float[8,8,1,1] w2) => (float[1,8,8,8] y) {
            c = Conv(x, w1)  a = Add(c, x)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)  y = Conv(p, w2) }""",
        "case6-activations": """(float[1,16,32] x, float[32,32] w1) => (float[1,16,16] y) {
            m = MatMul(x, w1)  t = Transpose<perm=[0,2,1]>(x)  y = MatMul(m, t) }""",
        "case7-stored-products": """(float[4,64] x, float[64,32] w1, float[16,32] w2, float[16] w3, float[16,8] w4)
            => (float[4,8] y) { m = MatMul(x, w1)  g = Gemm<transB=1>(m, w2, w3)  r = Relu(g)  y = MatMul(r, w4) }""",
        "case8-transposed": """(float[1,8,8,8] x, float[8,8,1,1] w1, float[8,8,3,3] w2, float[8] w3, float[8,4,2,2] w4)
            => (float[1,8,32,32] y) { c = Conv(x, w1)  r = Relu(c)  p = MaxPool<kernel_shape=[2,2]>(r)
            t = ConvTranspose<strides=[2,2]>(p, w2, w3)  s = Sigmoid(t)
            y = ConvTranspose<strides=[2,2], group=2>(s, w4) }""",
        "case8-float": """(float[1,8,8,8] x, float[8,8,2,2] w1, float[8,8,1,1] w2) => (float[1,8,16,16] y) {
            t = ConvTranspose<strides=[2,2]>(x, w1)  y = Conv(t, w2) }""",
        "case9-run-time-ranges": """(float[4,64] x, float[64,32] w1) => (float[4,32] y) { m = MatMul(x, w1)
            y = Neg(m) }""",
        "case10-brain-float": """(float[1,8,8,8] x, float[8,8,1,1] w1) => (float[1,8,8,8] y) { c = Conv(x, w1)
            y = Exp(c) }""",
        "case11-tables": """(int64[2,3] i, float[128,64] w1, float[256,64] w2, float[256,64] w3, float[256,40] w4)
            => (float[2,3,64] y, float[2,3,40] d) { a = Gather(w1, i)  b = Gather(w2, i)  c = Gather(w3, i)
            d = Gather(w4, i)  e = Add(a, b)  y = Add(e, c) }""",
    },
    "tensorrt": {
        "case1-conv": """(float[1,3,8,8] x, float[4,3,3,3] w1, float[4] w2, float[4,4,3,3] w3) => (float[1,4,8,8] y) {
            c = Conv<pads=[1,1,1,1]>(x, w1, w2)  v = Constant<value_floats=[0.5,1.0,1.5,2.0]>()
            b = BatchNormalization(c, v, v, v, v)  s = Sigmoid(b)  m = Mul(b, s)
            d = Conv<pads=[1,1,1,1]>(m, w3)  y = Relu(d) }""",
        "case1-transposed-gemm": """(float[1,3,2,2] x, float[3,4,2,2] w1, float[4] w2, float[5,64] w3, float[5] w4)
            => (float[1,5] y) { t = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(x, w1, w2)  f = Flatten(t)
            y = Gemm<transB=1>(f, w3, w4) }""",
        "case2-residual": RESIDUAL,
        "case3-attention": """(float[1,2,6,4] q, float[1,2,4,6] k, float[1,2,6,4] v) => (float[1,2,6,4] y) {
            m = MatMul(q, k)  h = Constant<value_float=0.5>()  s = Mul(m, h)  p = Softmax(s)  y = MatMul(p, v) }""",
        "case4-concat": CONCAT,
        "case5-matmul-bias-gelu": """(float[1,5,4] x, float[4,8] w1, float[8] w2, float[8,4] w3, float[4] w4)
            => (float[1,5,4] y) { m = MatMul(x, w1)  a = Add(m, w2)  k = Constant<value_float=1.4142135>()
            d = Div(a, k)  e = Erf(d)  one = Constant<value_float=1.0>()  f = Add(e, one)  g = Mul(a, f)
            half = Constant<value_float=0.5>()  h = Mul(g, half)  n = MatMul(h, w3)  y = Add(n, w4) }""",
        "case6-half-beside-int8": RESIDUAL,
        "case7-fp8": """(float[1,3,8,8] x, float[24,3,3,3] w1, float[24] w2, float[24,24,3,3] w3, float[24,24,1,1] w4,
            float[24,1,3,3] w5, float[24,24,7,7] w6, float[24,8,3,3] w7) => (float[1,8,8,8] y) {
            c = Conv<pads=[1,1,1,1]>(x, w1)  r = Relu(c)  d = Conv<pads=[1,1,1,1]>(r, w3, w2)  a = Add(d, r)
            s = Relu(a)  e = Conv(s, w4)  g = Conv<group=24, pads=[1,1,1,1]>(e, w5)  h = Conv<pads=[3,3,3,3]>(g, w6)
            y = ConvTranspose<pads=[1,1,1,1]>(h, w7) }""",
        "case7-fp8-products": """(float[1,20,32] x, float[32,32] w1, float[32,8] w2, float[24,640] w3, float[24] w4)
            => (float[1,24] y, float[1,20,8] z, float[1,20,32] o) { q = MatMul(x, w1)  t = Transpose<perm=[0,2,1]>(q)
            p = MatMul(q, t)  o = MatMul(p, x)  z = MatMul(q, w2)  m = Flatten<axis=1>(q)
            y = Gemm<transB=1>(m, w3, w4) }""",
        "case7-fp8-beside-others": """(float[1,24,8,8] x, float[24,24,3,3] w1, float[24,24,3,3] w2, float[24,24,3,3] w3,
            float[24,24,3,3] w4) => (float[1,24,8,8] y, float[1,24,8,8] e) { c = Conv<pads=[1,1,1,1]>(x, w1)
            r = Relu(c)  d = Conv<pads=[1,1,1,1]>(r, w2)  a = Add(d, r)  e = Conv<pads=[1,1,1,1]>(a, w3)
            y = Conv<pads=[1,1,1,1]>(a, w4) }""",
        "case8-int4": """(float[1,5,128] x, float[128,128] w1, float[128] w2, float[32,128] w3, float[32] w4,
            float[32,8] w5) => (float[5,8] y) { m = MatMul(x, w1)  a = Add(m, w2)  r = Relu(a)  s = Flatten<axis=2>(r)
            g = Gemm<transB=1>(s, w3, w4)  y = MatMul(g, w5) }""",
        "case9-brain-float": """(float[1,8,16,16] x, float[8,8,1,1] w1, float[8,8,1,1] w2, float[8] w3)
            => (float[1,8,8,8] y) { c = Conv(x, w1)  e = Exp(c)
            p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(e)  y = Conv(p, w2, w3) }""",
        "case10-tables": """(int64[2,3] i, float[128,64] w1, float[256,64] w2) => (float[2,3,64] y) {
            a = Gather(w1, i)  b = Gather(w2, i)  y = Add(a, b) }""",
    },
    "tensorrt-rtx": {
        "case1-conv": """(float[1,8,8,8] x, float[16,8,3,3] w1, float[16,16,3,3] w2, float[16,16,3,3] w3)
            => (float[1,16,8,8] y) { c = Conv<pads=[1,1,1,1]>(x, w1)  s = Sigmoid(c)  m = Mul(c, s)
            d = Conv<pads=[1,1,1,1]>(m, w2)  a = Add(d, m)  r = Relu(a)  y = Conv<pads=[1,1,1,1]>(r, w3) }""",
        "case1-products": """(float[1,20,32] x, float[32,64] w1, float[64] w2, float[64,16] w3, float[16] w4)
            => (float[20,16] y) { m = MatMul(x, w1)  a = Add(m, w2)  g = Gelu(a)  f = Flatten<axis=2>(g)
            y = Gemm(f, w3, w4) }""",
        "case2-biases": """(float[1,8,8,8] x, float[8,8,1,1] w1, float[8] w2, float[8,8,3,3] w3, float[8] w4)
            => (float[1,8,8,8] y) { c = Conv(x, w1, w2)  r = Relu(c)  y = Conv<pads=[1,1,1,1]>(r, w3, w4) }""",
        "case3-transposed": """(float[1,8,4,4] x, float[8,8,2,2] w1, float[8] w2, float[8,8,1,1] w3)
            => (float[1,8,8,8] y) { t = ConvTranspose<strides=[2,2]>(x, w1, w2)  y = Conv(t, w3) }""",
        "case4-groups": """(float[1,8,8,8] x, float[8,1,3,3] w1, float[8,2,3,3] w2, float[8,4,3,3] w3)
            => (float[1,8,8,8] y) { d = Conv<group=8, pads=[1,1,1,1]>(x, w1)  p = Conv<group=4, pads=[1,1,1,1]>(d, w2)
            y = Conv<group=2, pads=[1,1,1,1]>(p, w3) }""",
        "case5-one-block": """(float[1,5,128] x, float[128,128] w1, float[128,64] w2) => (float[1,5,64] y) {
            m = MatMul(x, w1)  y = MatMul(m, w2) }""",
        "case6-sums": """(float[1,8,8,8] x, float[16,8,3,3] w1, float[16] w2, float[16,16,1,1] w3, float[16,5] w4)
            => (float[1,5] y) { c = Conv<pads=[1,1,1,1]>(x, w1, w2)  r = Relu(c)  d = Conv(r, w3)  a = Add(d, r)
            p = GlobalAveragePool(a)  f = Flatten(p)  y = MatMul(f, w4) }""",
        "case7-turing": """(float[1,8,8,8] x, float[8,8,1,1] w1, float[8,8,1,1] w2) => (float[1,8,8,8] y) {
            c = Conv(x, w1)  e = Exp(c)  y = Conv(e, w2) }""",
        "case7-ada": """(float[1,24,8,8] x, float[24,24,3,3] w1, float[24,24,1,1] w2) => (float[1,24,8,8] y) {
            c = Conv<pads=[1,1,1,1]>(x, w1)  r = Relu(c)  y = Conv(r, w2) }""",
    },
    "ort-cuda": {
        "case1-half": CONCAT,
        "case2-no-int8": """(float[1,8,4,4] x, float[8,8,1,1] w1, float[8] w2) => (float[1,8,4,4] y) {
            c = Conv(x, w1, w2)  y = Relu(c) }""",
        "case3-movers": """(float[1,8,4,4] x, float[8,8,1,1] w1) => (float[1,4,4,8] y) {
            c = Conv(x, w1)  t = Transpose<perm=[0,2,3,1]>(c)  y = Neg(t) }""",
        "case4-stored-products": """(float[4,64] x, float[64,32] w1, float[16,32] w2, float[16] w3, float[16,8] w4)
            => (float[4,8] y) { m = MatMul(x, w1)  s = Sigmoid(m)  g = Gemm<transB=1>(s, w2, w3)
            y = MatMul(g, w4) }""",
        "case5-columns": """(float[4,64] x, float[64,12] w1, float[12,8] w2) => (float[4,8] y) {
            m = MatMul(x, w1)  y = MatMul(m, w2) }""",
        "case6-tables": """(int64[2,3] i, float[128,64] w1, float[256,64] w2) => (float[2,3,64] y) {
            a = Gather(w1, i)  b = Gather(w2, i)  y = Add(a, b) }""",
    },
}
SCHEMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("ort-cpu", "case7-stored-products"): ("w8", "int8-dynamic", "w4", "int8"),
    ("openvino-cpu", "case7-stored-products"): ("w8", "w4", "int8"),
    ("tensorrt", "case8-int4"): ("fp16", "w4", "w4-128", "int8"),
    ("tensorrt", "case9-brain-float"): ("bf16", "fp16", "int8"),
    ("tensorrt-rtx", "case5-one-block"): ("fp16", "w4", "w4-128"),
    ("ort-cuda", "case4-stored-products"): ("fp16", "w8", "w4"),
    ("ort-cuda", "case5-columns"): ("fp16", "w4"),
    ("openvino-cpu", "case9-run-time-ranges"): ("w8", "int8"),
    ("ort-cpu", "case9-tables"): ("w16", "w8", "w4", "int8"),
    ("openvino-cpu", "case11-tables"): ("w16", "w8", "w4", "int8"),
    ("tensorrt", "case10-tables"): ("fp16", "w8-row", "int8"),
    ("ort-cuda", "case6-tables"): ("fp16", "w8-row"),
}
"""Schemes that plans may use, where these are not the usual ones of the target."""
PLANS: dict[tuple[str, str], Callable[[UnitGraph], Plan]] = {
    ("ort-cpu", "case7-stored-products"): lambda units: Plan(
        {
            "/m/MatMul": "w4",
            "/g/Gemm": "int8-dynamic",
            "/y/MatMul": "w8",
        }
    ),
    ("openvino-cpu", "case7-stored-products"): lambda units: Plan({"/m/MatMul": "w4", "/g/Gemm": "w8"}),
    ("tensorrt", "case8-int4"): lambda units: Plan({"/m/MatMul": "w4", "/g/Gemm": "w4-128", "/y/MatMul": "int8"}),
    ("tensorrt", "case9-brain-float"): lambda units: Plan(
        {"/c/Conv": "fp16", "/e/Exp": "bf16", "/p/AveragePool": "bf16", "/y/Conv": "int8"}
    ),
    ("tensorrt-rtx", "case5-one-block"): lambda units: Plan({"/m/MatMul": "fp16", "/y/MatMul": "w4"}),
    ("tensorrt-rtx", "case7-ada"): lambda units: Plan({"/c/Conv": "fp8", "/y/Conv": "int8"}),
    ("ort-cuda", "case4-stored-products"): lambda units: Plan(
        {"/m/MatMul": "w4", "/s/Sigmoid": "fp16", "/g/Gemm": "w8"}
    ),
    ("ort-cpu", "case9-tables"): lambda units: Plan({"/a/Gather": "w4", "/b/Gather": "w8", "/c/Gather": "w16"}),
    ("openvino-cpu", "case11-tables"): lambda units: Plan({"/a/Gather": "w4", "/b/Gather": "w8", "/c/Gather": "w16"}),
    ("tensorrt", "case10-tables"): lambda units: Plan({"/a/Gather": "w8-row", "/b/Gather": "fp16"}),
    ("ort-cuda", "case6-tables"): lambda units: Plan({"/a/Gather": "w8-row", "/b/Gather": "fp16"}),
    ("tensorrt", "case1-conv"): UnitGraph.lowest_gated,
    ("tensorrt", "case1-transposed-gemm"): UnitGraph.lowest_gated,
    ("tensorrt", "case2-residual"): UnitGraph.lowest_gated,
    ("tensorrt", "case6-half-beside-int8"): lambda units: int8(("/c/Conv", "/y/Conv")).moved("/d/Conv", "fp16"),
    ("tensorrt", "case7-fp8"): lambda units: Plan.of("fp8", *units.able("fp8")),
    ("tensorrt", "case7-fp8-products"): lambda units: Plan.of("fp8", *units.able("fp8")),
    ("tensorrt", "case7-fp8-beside-others"): lambda units: Plan(
        {"/c/Conv": "fp16", "/d/Conv": "fp8", "/a/Add": "fp8", "/e/Conv": "int8", "/y/Conv": "fp8"}
    ),
}
ON: Mapping[tuple[str, str], str] = {
    **{("tensorrt", case): "l4" for case in CASES["tensorrt"] if "fp8" in case},
    ("tensorrt-rtx", "case7-turing"): "sm75",
    ("tensorrt-rtx", "case7-ada"): "sm89",
}
"""Device of the cases that need another than that of their target."""
PAIR_LIMIT: Mapping[str, int | None] = {"ort-cpu": 128, "openvino-cpu": 128}
"""Pair limit of the targets whose own one depends on the processor."""
LOWER = {ir.DataType.FLOAT16: ":float16", ir.DataType.BFLOAT16: ":bfloat16"}
"""How a text marks what is computed in another type than float32."""
SMALL = 16
"""Largest number of elements of a constant that a text prints; of others it prints a hash."""


@dataclass(frozen=True)
class Rewritten:
    """A case in the precisions of its plan."""

    graph: Graph
    units: UnitGraph
    plan: Plan
    model: ir.Model
    feeds: Mapping[str, np.ndarray]
    target: Target
    ranges: Mapping[str, tuple[float, float]]

    @property
    def artefact(self) -> Artefact:
        return Artefact({ONLY: self.model}, runtime=self.target.runtime)


def rewrite(name: str, case: str, folder: Path, pair_limit: int | None) -> Rewritten:
    """Make a case's model, split it for the target with a pair limit and rewrite it."""
    text = re.sub(r"[ \n]+", " ", CASES[name][case])
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> tiny {text}')
    generator = np.random.default_rng(0)
    for value in [v for v in model.graph.input if v.name.startswith("w")]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = (generator.standard_normal(shape) / 4).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.save(model, folder / "case.onnx")
    graph, device = load_graph(folder / "case.onnx"), target(name, ON.get((name, case), ""))
    if name in PAIR_LIMIT:
        device = with_pair_limit(device, pair_limit)
    units = split(graph, device, find_heads(graph), schemes=SCHEMES.get((name, case), ()))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    whole = {v.name for v in model.graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.INT64}
    feeds = {
        v: generator.integers(-16, 16, shape) if v in whole else generator.standard_normal(shape).astype(np.float32)
        for v, shape in shapes.items()
    }
    tensors = {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
    found = collect(graph.model, [t for t in graph.value if t in tensors], [feeds]).ranges("minmax")
    ranges = {tensor: (float(f"{low:.3g}"), float(f"{high:.3g}")) for tensor, (low, high) in found.items()}
    plan = PLANS.get((name, case), UnitGraph.lowest)(units)
    made = write_plan(graph, Recipe(units, device, ranges), plan)
    if device.rounds_apart:
        halve_sums(made.model)
    return Rewritten(graph, units, plan, made.model, feeds, device, ranges)


def as_text(made: Rewritten) -> str:
    """Units with their reasons, then the rewritten nodes in order, with their constants; halves are marked."""
    lines = [f"without {scheme.upper()}: {reason}" for scheme, reason in made.units.lacks.items()]
    for unit in made.units.units:
        formats = "/".join(unit.allowed) + (f" ({unit.why})" if unit.why else "")
        lines.append(f"unit {unit.id}: {' '.join((*unit.core, *(f'[{t}]' for t in unit.tail)))}: {formats}")
    for node in made.model.graph:
        inputs = ", ".join(_operand(v) for v in node.inputs)
        outputs = ", ".join(f"{v.name}{LOWER.get(v.dtype or ir.DataType.FLOAT, '')}" for v in node.outputs)
        lines.append(f"{outputs} = {node.op_type}({inputs})  # {node.metadata_props[TAG]}")
    return "\n".join(lines) + "\n"


def _operand(value: ir.Value | None) -> str:
    if value is None:
        return ""
    array = constant(value)
    return str(value.name) if array is None else _constant(array)


def _constant(array: np.ndarray) -> str:
    """Type and shape, then the values with all their digits, equal ones once; of many values the hash."""
    kind = f"{array.dtype}{list(array.shape)}"
    if array.size and (array == array.flat[0]).all():
        return f"{kind} {array.flat[0]!s}"
    if array.size > SMALL:
        return f"{kind} #{hashlib.sha256(array.tobytes()).hexdigest()[:8]}"
    return f"{kind} {' '.join(str(v) for v in array.ravel())}"


class Rewrite:
    """Makes cases, with the pair limit of `PAIR_LIMIT` where no other is given."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __call__(self, name: str, case: str) -> Rewritten:
        return self.limited(name, case, PAIR_LIMIT.get(name))

    def limited(self, name: str, case: str, pair_limit: int | None) -> Rewritten:
        return rewrite(name, case, self._factory.mktemp("case"), pair_limit)


@pytest.fixture(name="rewrite", scope="session")
def rewrite_fixture(tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    return Rewrite(tmp_path_factory)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with `name` and `case` run for every case of every target."""
    if {"name", "case"} <= set(metafunc.fixturenames):
        pairs = [(name, case) for name, cases in CASES.items() for case in cases]
        metafunc.parametrize(("name", "case"), pairs, ids=[f"{n}-{c}" for n, c in pairs])


@pytest.fixture(name="as_text", scope="session")
def as_text_fixture() -> Callable[[Rewritten], str]:
    return as_text
