"""The paths in a bundle, relative to it."""

MANIFEST_FILE = "manifest.json"
# Where stages work; it is gone once the bundle is sealed.
PARTIAL = ".partial"
STAGES = "stages"
# Outputs of the stages that prune, quantise, export and compile.
PRUNED = "pruned"
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
LATE_FILES = (CARD, RECIPE)
REPORT_FILE = "report.json"
REPORT_FILES = (REPORT_FILE, "report.html", "summary.md", "junit.xml", "benchmark.json")


def reproduction_of(backend: str) -> str:
    """The script that makes and times the engines of a backend by the tools of its vendor."""
    return f"{ENGINES}/{backend}/reproduce.sh"


def record_of(stage: str) -> str:
    """The file that holds the result of a stage."""
    return f"{STAGES}/{stage}.json"


def lies_below(file: str, output: str) -> bool:
    """Whether a file is an output, or lies in the folder that it is."""
    return file == output or file.startswith(f"{output}/")
