"""The table of tasks against the names that recipes may have."""

import ast
from pathlib import Path
from typing import get_args

import pytest
import transformers

from prox24_deploy.core.tasks import TASKS, Task, task_of_class

PACKAGE = Path(__file__).parents[2] / "prox24_deploy"


def test_every_name_of_a_task_has_its_row_and_every_row_opens_a_model() -> None:
    assert TASKS.keys() == set(get_args(Task))
    for name, kind in TASKS.items():
        assert kind.name == name
        assert hasattr(getattr(transformers, kind.auto_class), "from_pretrained")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForTokenClassification", "token-classification"),
        ("T5EncoderModel", "text-encoding"),
        ("BertModel", "feature-extraction"),
        ("", "feature-extraction"),
    ],
)
def test_how_the_name_of_a_class_ends_tells_its_task(architecture: str, task: Task) -> None:
    assert task_of_class(architecture).name == task


def test_no_evaluation_writes_the_name_of_a_task() -> None:
    for path in (PACKAGE / "evaluation").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in TASKS, (path, node.value)
