"""The terms of the report and of the documents, each defined once."""

from __future__ import annotations

from markupsafe import Markup

GLOSSARY = {
    "agreement": "How far the mixed model says on a sample what the float model says, from 0 to 1. It needs no labels.",
    "border": (
        "A tensor between two units of different schemes. It is converted there, which takes time that the plan pays "
        "for."
    ),
    "calibration": (
        "The run of the float model over samples that finds the range of every tensor, from which the scale of its "
        "rounding follows."
    ),
    "cost table": (
        "Time and bytes of every unit in every scheme, and the price of borders: measured on this machine, or "
        "estimated from the peak rates of a device that is not here."
    ),
    "front": (
        "Pareto front: the plans that no other plan beats in latency and error at the same time. Each costs the least "
        "error at its latency."
    ),
    "head": (
        "An output of the model, or a meaningful part of one, such as boxes or scores. Errors are told for each head."
    ),
    "mixed": "The shipped model: each unit in the scheme that the plan gives it.",
    "plan": "The choice of a scheme for every unit.",
    "probe matrix": (
        "How an error at every possible rounding place would reach every head, found by sending random signs backwards "
        "through the float network. It predicts the error of any plan without running it."
    ),
    "region": "A named part of the model, such as a block of layers. Regions nest, and units lie in regions.",
    "scheme": (
        "How a unit computes: in float (FP32), in half precision (FP16), with 8-bit integers (INT8), and others that "
        "the target runs."
    ),
    "site": "One place where a tensor or a weight can be rounded.",
    "SQNR": (
        "Signal-to-quantization-noise ratio: energy of the float model's output over energy of the error, in decibels. "
        "20 dB is 1 % of error energy, and 10 dB more is ten times less."
    ),
    "unit": (
        "The smallest part of a model that has one scheme: an operator with those that the runtime joins to it, such "
        "as a convolution with its bias."
    ),
}
"""Term -> its definition, in alphabetical order; the report shows them as tooltips, the documents list them."""


def explained(term: str, shown: str = "") -> Markup:
    """Return a term as HTML that explains itself to the pointer and to the keyboard.

    >>> explained("plan", "plans")
    Markup('<span class="term" tabindex="0" data-tip="The choice of a scheme for every unit.">plans</span>')
    """
    return Markup('<span class="term" tabindex="0" data-tip="{}">{}</span>').format(GLOSSARY[term], shown or term)
