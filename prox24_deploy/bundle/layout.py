"""The paths in a bundle, relative to it."""

from collections.abc import Collection

MANIFEST_FILE = "manifest.json"
# Where stages work; it is gone once the bundle is sealed.
PARTIAL = ".partial"
STAGES = "stages"
# Text that the model wrote to be calibrated on: (windows, tokens of each).
WRITTEN = "written"
WRITTEN_TOKENS = f"{WRITTEN}/tokens.safetensors"
# Outputs of the stages that prune, recover, quantise, export and compile.
PRUNED = "pruned"
RECOVERED = "recovered"
QUANTIZED = "quantized"
ONNX = "onnx"
ENGINES = "engines"
# What is quantised and how well, for readers, and the numbers and scales.
QUANTIZATION_FILE = f"{QUANTIZED}/quantization.json"
QUANTIZED_TENSORS = f"{QUANTIZED}/quantization.safetensors"
# Written into the output of a stage once it has ended: the model card, and the recipe with its
# limits and comments. That they are there, or other than before, says nothing of the stage.
CARD = f"{PRUNED}/README.md"
RECIPE = f"{PRUNED}/recipe.toml"
RECOVERED_CARD = f"{RECOVERED}/README.md"
RECOVERED_RECIPE = f"{RECOVERED}/recipe.toml"
RECIPES = (RECIPE, RECOVERED_RECIPE)
LATE_FILES = (CARD, RECOVERED_CARD, *RECIPES)
REPORT_FILE = "report.json"
REPORT_FILES = (REPORT_FILE, "report.html", "summary.md", "junit.xml", "benchmark.json")


def reproduction_of(backend: str) -> str:
    """The script that makes and times the engines of a backend by the tools of its vendor."""
    return f"{ENGINES}/{backend}/reproduce.sh"


def shipped_folder(files: Collection[str]) -> str:
    """Which of the folders of a bundle with these files holds the sparse model that is shipped."""
    return RECOVERED if record_of("recover") in files else PRUNED


def record_of(stage: str) -> str:
    """The file that holds the result of a stage."""
    return f"{STAGES}/{stage}.json"


def lies_below(file: str, output: str) -> bool:
    """Whether a file is an output, or lies in the folder that it is."""
    return file == output or file.startswith(f"{output}/")
