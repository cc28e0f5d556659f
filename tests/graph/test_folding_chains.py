"""Random chains of nodes between a stored weight and its consumer, against an evaluator."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from graph_models import Array, bad_groups, ints, multiplied_matrix, node, write_onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_deploy.graph.check.check import check_onnx


class Chain:
    """Nodes from "w" on, and the same done to an array that numbers the stored elements."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.numbers = np.arange(math.prod(shape)).reshape(shape)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.last = "w"

    def add(self, op: str, result: Array, *inputs: Array, **attributes: Any) -> None:
        output = f"v{len(self.nodes)}"
        names = [f"{output}_{i}" for i in range(len(inputs))]
        self.constants.update(zip(names, inputs, strict=True))
        self.nodes.append(node(op, [self.last, *names], output, **attributes))
        self.numbers, self.last = result, output

    def transpose(self, order: Sequence[int]) -> None:
        self.add("Transpose", self.numbers.transpose(order), perm=list(order))

    def reshape(self, shape: Sequence[int]) -> None:
        self.add("Reshape", self.numbers.reshape(shape), ints(*shape))

    def slice(self, axis: int, start: int, end: int, step: int) -> None:
        cut = self.numbers[(slice(None),) * axis + (slice(start, end, step),)]
        self.add("Slice", cut, ints(start), ints(end), ints(axis), ints(step))

    def unsqueeze(self, axis: int) -> None:
        self.add("Unsqueeze", np.expand_dims(self.numbers, axis), ints(axis))

    def squeeze(self) -> None:
        self.add("Squeeze", self.numbers.squeeze())

    def pick(self, axis: int, index: int) -> None:
        self.add(
            "Gather", np.take(self.numbers, [index], axis).squeeze(axis), np.array(index), axis=axis
        )

    def rows_by_columns(self) -> None:
        if self.numbers.ndim != 2:
            self.add("Flatten", self.numbers.reshape(self.numbers.shape[0], -1), axis=1)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """A weight of two to four axes, renumbered up to four times, with two axes in the end."""
    shape = tuple(draw(st.lists(st.sampled_from([2, 4, 8]), min_size=2, max_size=4)))
    chain = Chain(shape)
    for _ in range(draw(st.integers(0, 4))):
        rank, now = chain.numbers.ndim, chain.numbers.shape
        axis = draw(st.integers(0, rank - 1))
        match draw(st.sampled_from(["transpose", "reshape", "slice", "one", "pick"])):
            case "transpose":
                chain.transpose(draw(st.permutations(range(rank))))
            case "reshape" if rank > 1:
                joined = (*now[:axis], -1, *now[axis + 2 :]) if axis + 1 < rank else (*now, 1)
                chain.reshape(joined)
            case "slice":
                start = draw(st.integers(0, now[axis] // 2 - 1)) if now[axis] > 1 else 0
                chain.slice(axis, start, 2**62, draw(st.integers(1, 2)))
            case "one":
                chain.unsqueeze(axis)
            case "pick" if rank > 2:
                chain.pick(axis, now[axis] - 1)
    if chain.numbers.ndim < 2:
        chain.unsqueeze(0)
    chain.rows_by_columns()
    return chain


def stored_values(chain: Chain, random: np.random.Generator, *, spoiled: bool) -> Array:
    """Values whose multiplied matrix is 2:4, but for one group if `spoiled`."""
    stored = np.ones(chain.shape, np.float32)
    inputs, outputs = chain.numbers.shape
    if inputs % 4:
        return stored
    groups = chain.numbers.reshape(-1, 4, outputs)
    zero = random.random(groups.shape).argsort(1) < 2
    stored.flat[groups[zero]] = 0
    if spoiled:
        stored.flat[groups[random.integers(len(groups)), :, random.integers(outputs)]] = 3
    return stored


@settings(max_examples=200)
@given(chain=chains(), spoiled=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_chain_is_proven_exactly_or_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, chain: Chain, *, spoiled: bool, seed: int
) -> None:
    stored = stored_values(chain, np.random.default_rng(seed), spoiled=spoiled)
    nodes = [*chain.nodes, node("MatMul", ["x", chain.last], "y")]
    path = tmp_path_factory.mktemp("chain") / "m.onnx"
    checks = check_onnx(write_onnx(path, nodes, {"w": stored, **chain.constants}))
    matrix = multiplied_matrix(path, len(chain.numbers))
    assert (matrix == stored.flat[chain.numbers]).all()
    if len(matrix) == 1:
        assert all("no fixed steps" in check.reason for check in checks)
        return
    (check,) = checks
    if "no fixed steps" in check.reason:
        assert (check.is_24, check.axis) == (False, -1)
        return
    assert check.is_24 == (len(matrix) % 4 == 0 and not bad_groups(matrix))
    assert check.density == pytest.approx(np.count_nonzero(matrix) / matrix.size)
    if check.first_violation:
        begin = np.ravel_multi_index(check.first_violation, stored.shape)
        group, column = (int(i[0]) for i in np.nonzero(chain.numbers == begin))
        assert group % 4 == 0
        assert np.count_nonzero(matrix[group : group + 4, column]) > 2
