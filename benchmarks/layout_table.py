"""Write `prox24_deploy/graph/check/layouts.json`: what the architectures of transformers store how.

    python benchmarks/layout_table.py

It reads the source of the installed transformers: every type of model that it knows, those whose
code uses the transposed Conv1D of GPT-2, and those with transposed convolutions, whose reduction
axis is another than that of a convolution. No model is built.
"""

import json
import re
from pathlib import Path

import transformers
from transformers.models.auto import configuration_auto

TABLE = Path(__file__).parents[1] / "prox24_deploy" / "graph" / "check" / "layouts.json"
_MODELS = Path(transformers.__file__).parent / "models"
_CONV1D = re.compile(r"pytorch_utils import (\([^)]*|.*)\bConv1D\b")


def sources_of(model_type: str) -> str:
    """The code of all models of one type."""
    folder = _MODELS / configuration_auto.model_type_to_module_name(model_type)
    return "".join(
        path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py"))
    )


def layouts() -> dict[str, list[str]]:
    """Types of models by what their code uses."""
    code = {name: sources_of(name) for name in sorted(configuration_auto.CONFIG_MAPPING.keys())}
    return {
        "conv1d": [name for name, text in code.items() if _CONV1D.search(text)],
        "transposed_convolutions": [name for name, text in code.items() if "ConvTranspose" in text],
        "types": list(code),
    }


def main() -> None:
    types = layouts()
    table = {"transformers": transformers.__version__, "types": types}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{len(names)} {name}" for name, names in types.items())
    print(f"{TABLE}: {counts}")


if __name__ == "__main__":
    main()
