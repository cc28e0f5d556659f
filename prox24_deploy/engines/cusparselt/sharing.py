"""Let Inductor compute once what several layers compute alike.

Layers that are parts of one product each ask for it. Layers that share an input and its scale
quantise it by equal expressions; Inductor fuses these into one kernel, but without this pass that
kernel writes a copy for each layer.
"""

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload

# The namespace of our operators, all of which are products.
OPERATORS = "prox24_deploy"
# Functions of their arguments and of nothing else, besides all pointwise operators.
_PURE = {
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.prims.convert_element_type.default,
}


class ShareEqual(CustomGraphPass):
    """Replaces a node of a functional graph by an earlier one of the same operator and arguments.

    Only operators are looked at of which it is known that they draw and write nothing.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        known: dict[tuple[str, str, str], fx.Node] = {}
        for node in list(graph.nodes):
            if not _is_pure(node):
                continue
            # Of a node the text is its name, and of a number all that tells it from others.
            key = str(node.target), repr(node.args), repr(node.kwargs)
            first = known.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> bytes:
        """What distinguishes compiled code with this pass from that without, in caches."""
        return get_hash_for_files((__file__,))


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    drawn = torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable
    own = target.namespace == OPERATORS
    return not drawn and (own or target in _PURE or torch.Tag.pointwise in target.tags)
