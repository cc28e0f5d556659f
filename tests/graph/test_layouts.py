"""The table of architectures, against the modules that transformers builds."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from layout_table import TABLE, layouts
from tiny_models import write_tiny_bert, write_tiny_gpt2, write_tiny_llama
from torch import nn
from transformers import AutoModel

from prox24_deploy.graph.check.layouts import NotSummed, Summed, read_layout

WRITERS = {"bert": write_tiny_bert, "gpt2": write_tiny_gpt2, "llama": write_tiny_llama}


def test_the_table_is_that_of_the_installed_transformers() -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is that of transformers {table['transformers']}")
    assert table["types"] == layouts()


def axes_of(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of all matrices and the axes that their modules sum over."""
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            yield f"{name}.weight", 1
        elif type(part).__name__ == "Conv1D":
            yield f"{name}.weight", 0


@pytest.mark.parametrize("family", WRITERS)
def test_every_matrix_of_a_model_has_the_axis_that_its_module_sums_over(
    tmp_path: Path, family: str
) -> None:
    folder = WRITERS[family](tmp_path / family)
    model = AutoModel.from_pretrained(folder)
    layout = read_layout(folder)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = dict(axes_of(model))
    assert expected
    found = {name: layout.role(name, shapes[name], shapes) for name in expected}
    assert {name: role.axis for name, role in found.items() if isinstance(role, Summed)} == expected
    biases = [name for name in shapes if name.endswith("bias")]
    assert all(isinstance(layout.role(n, shapes[n], shapes), NotSummed) for n in biases)
