"""One node on the way from stored constants to a product, with what is known of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import input_of
from prox24_deploy.graph.check.shapes import Lengths, Shapes
from prox24_deploy.graph.check.sources import Folded, Runtime, Source
from prox24_deploy.sparsity.groups import Array

# Bounds and shapes have no more numbers than a sound file needs.
_MOST_NUMBERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A node, which of its results is asked for, and the source of every input.

    `read` gives the array of a constant value, None where the check does not compute it, and
    `shapes` what is known of the lengths of any value.
    """

    node: ir.Node
    output: int
    sources: tuple[Source, ...]
    read: Callable[[ir.Value], Array | None]
    shapes: Shapes

    @property
    def op(self) -> str:
        """Name of the operator."""
        return self.node.op_type

    def source(self, index: int = 0) -> Source:
        """Source of an input, a `Runtime` where it is left out."""
        return self.sources[index] if index < len(self.sources) else Runtime()

    def has(self, index: int) -> bool:
        """Whether an input is given at all."""
        return input_of(self.node, index) is not None

    def is_constant(self, index: int) -> bool:
        """Whether an input is given and nothing at run time changes it."""
        source = self.source(index)
        return not isinstance(source, Runtime) and source.nature == "constant"

    def array(self, index: int) -> Array | None:
        """A constant input as an array, None if it is not constant or not computed."""
        value = input_of(self.node, index)
        return None if value is None or not self.is_constant(index) else self.read(value)

    def numbers(
        self, index: int, attribute: str = "", default: tuple[int, ...] | None = None
    ) -> tuple[int, ...] | None:
        """Integers given as an input, or as an attribute in older operator sets."""
        if self.has(index):
            array = self.array(index)
            small = array is not None and array.dtype.kind in "iu" and array.size <= _MOST_NUMBERS
            return tuple(int(n) for n in array.reshape(-1)) if array is not None and small else None
        given = attributes.integers(self.node, attribute) if attribute else None
        return default if given is None else given

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return attributes.integer(self.node, name, default)

    def lengths(self, index: int) -> Lengths | None:
        """Lengths of an input, None where their number is not known for sure."""
        source = self.source(index)
        if isinstance(source, Folded) and not source.torn:
            return source.shape
        return self.shapes.sure(input_of(self.node, index))

    def rank(self, index: int) -> int | None:
        """Number of axes of an input, None where it is not known for sure."""
        source = self.source(index)
        if isinstance(source, Folded):
            return len(source.shape)
        lengths = self.lengths(index)
        return None if lengths is None else len(lengths)

    def covers(self, index: int, shape: tuple[int, ...]) -> bool:
        """Whether an input is longer than one along every axis along which a constant is.

        An activation is, whereas a scale of a weight is one long along some of its axes.
        """
        lengths = self.shapes.told(input_of(self.node, index))
        if lengths is None:
            return False
        own = (1,) * (len(shape) - len(lengths)) + lengths
        pairs = zip(reversed(shape), reversed(own), strict=False)
        return not any(n > 1 and m == 1 for n, m in pairs)
