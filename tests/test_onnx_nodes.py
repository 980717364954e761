"""The node tests that ONNX publishes for RMSNormalization and LayerNormalization: answers that nobody here wrote.

The package carries them as generators, which add their cases to a list when they are imported. Only the two modules
needed are imported; the rest, a thousand cases of other operators, would take seconds and warn.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from onnx.backend.test.case import node
from onnx.helper import get_attribute_value
from onnx.reference import ReferenceEvaluator

import rmsnorm_np as rn

for module in ("rmsnormalization", "layernormalization"):
    import_module(f"onnx.backend.test.case.node.{module}")

FUNCTIONS = {"RMSNormalization": rn.rms_norm, "LayerNormalization": rn.layer_norm}
CASES = {
    case.name: case
    for case in node._NodeTestCases
    if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in FUNCTIONS
}


def run(case, backend):
    """This package's answer to the case: ONNX's `axis` is the first of the axes, its default epsilon is 1e-5."""
    (operator,) = case.model.graph.node
    attributes = {attribute.name: get_attribute_value(attribute) for attribute in operator.attribute}
    ((inputs, _),) = case.data_sets
    copies = [array.copy() for array in inputs]
    first = attributes.get("axis", -1) % inputs[0].ndim
    y = FUNCTIONS[operator.op_type](
        *inputs,
        axis=tuple(range(first, inputs[0].ndim)),
        eps=attributes.get("epsilon", 1e-5),
        backend=backend,
    )
    for array, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    return y


def test_every_published_axis_is_here():
    """A generator that moved or changed would leave nothing to test, and nothing to fail."""
    for op_type in FUNCTIONS:
        cases = [case for case in CASES.values() if case.model.graph.node[0].op_type == op_type]
        assert len(cases) >= 19  # 2, 3 and 4 dimensions, each axis from both ends, with and without epsilon
        assert {case.data_sets[0][0][0].ndim for case in cases} == {2, 3, 4}


@pytest.mark.parametrize("name", CASES)
def test_published_output(name, backend):
    case = CASES[name]
    ((inputs, outputs),) = case.data_sets
    y = run(case, backend)
    assert y.dtype == outputs[0].dtype
    # ONNX computes in float32: n roundings in its sums, and some more, each relative to the largest term of y. Its own
    # tests accept 1e-3.
    n = inputs[1].size
    largest = np.max(np.abs(outputs[0])) + (np.max(np.abs(inputs[2])) if len(inputs) == 3 else 0.0)
    np.testing.assert_allclose(y, outputs[0], rtol=0, atol=(n + 8) * 2.0**-24 * largest)


@pytest.mark.parametrize("name", CASES)
def test_the_same_node_evaluated_in_float64_and_rounded_once(name, backend):
    case = CASES[name]
    ((inputs, _),) = case.data_sets
    wide = [array.astype(np.float64) for array in inputs]
    exact = ReferenceEvaluator(case.model).run(["Y"], dict(zip(case.model.graph.node[0].input, wide, strict=True)))[0]
    assert exact.dtype == np.float64
    y = run(case, backend)
    assert np.max(np.abs(y - exact) / np.spacing(np.abs(exact).astype(np.float32))) <= 0.51
