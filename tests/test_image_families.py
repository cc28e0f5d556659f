"""Image models from a directory and a folder of images to a proven bundle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import ANY_EMBEDDING, ANY_LABEL, run_cli
from PIL import Image
from torch import nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prox24_deploy.report.schema import Report, load_report

SIDE = 32
LABELS = {0: "cat", 1: "dog", 2: "bird", 3: "cow"}
_CLASSES = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE, "patch_size": 8, "initializer_range": 0.2,
}  # fmt: skip
# Class of transformers, options of its configuration, layers that its recipe prunes.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViTForImageClassification", _VIT | _CLASSES, 12),
    "vit backbone": ("ViTModel", _VIT, 12),
    "deit": ("DeiTForImageClassification", _VIT | _CLASSES, 12),
    "swin": (
        "SwinForImageClassification",
        {
            "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
            "image_size": SIDE, "patch_size": 4, "initializer_range": 0.2, **_CLASSES,
        },
        24,
    ),
    "resnet": (
        "ResNetForImageClassification",
        {
            "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2],
            "layer_type": "bottleneck", **_CLASSES,
        },
        13,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {
            "num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "patch_size": 4,
            "image_size": SIDE, "initializer_range": 0.2, **_CLASSES,
        },
        8,
    ),
    "clip vision": ("CLIPVisionModelWithProjection", _VIT | {"projection_dim": 16}, 12),
}  # fmt: skip


def write_model(path: Path, name: str) -> Path:
    """A tiny random model with an image processor."""
    torch.manual_seed(0)
    class_name, options, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**options))
    assert isinstance(model, nn.Module)
    model.save_pretrained(path)  # type: ignore[operator]
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images per label, of random colours about a mean of their own."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i, label in LABELS.items():
        (folder / label).mkdir()
        for j in range(12):
            pixels = random.normal(50 + 50 * i, 40, (40, 36, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{j}.png")
    return folder


def build(name: str, images: Path, tmp_path: Path, *more: str) -> Report:
    model_dir = write_model(tmp_path / "model", name)
    out = tmp_path / "out"
    done = run_cli(
        "build", model_dir, "-o", out, "--calibration", images, "--evaluation", images,
        "--preset", "fast", "--shapes", "batch=2", *more,
        *(ANY_LABEL if MODELS[name][0].endswith("ForImageClassification") else ANY_EMBEDDING),
    )  # fmt: skip
    assert done.code == 0, done.err
    return load_report(out / "report.json")


# One of each kind, for a whole build takes long; benchmarks/families.py exports all of them.
@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.large), "resnet"])
def test_an_image_model_is_built_and_proven(name: str, images: Path, tmp_path: Path) -> None:
    report = build(name, images, tmp_path, *(("--dtype", "float16") if name == "vit" else ()))
    proven = [tensor for tensor in report.sparsity.tensors if tensor.expected and tensor.is_24]
    assert len(proven) == report.pruning.totals.pruned == MODELS[name][2]
    for layer in report.pruning.layers:
        if layer.status == "pruned":
            assert layer.relative_error is not None
            assert 0 < layer.relative_error < 0.7
            assert layer.rows > 48
    assert (report.pruning.calibration.samples, report.pruning.calibration.unit) == (48, "image")
    assert [row.sequence for row in report.latency] == [0]
    assert run_cli("check", tmp_path / "out" / "pruned").code == 0
    names = [metric.name for metric in report.accuracy.metrics]
    if MODELS[name][0].endswith("ForImageClassification"):
        assert names == ["accuracy", "top-1 agreement", "KL divergence"]
    else:
        assert names == ["embedding cosine", "nearest-neighbour agreement"]
    (engine,) = report.accuracy.engines
    assert [metric.name for metric in engine.metrics] == names
    assert engine.tokens == engine.samples == engine.available
    if name == "vit":
        require_figures_of_transformers(report, images, tmp_path)
    assert all(one.passed is not False for one in engine.parity)


def require_figures_of_transformers(report: Report, images: Path, tmp_path: Path) -> None:
    """Recomputed from the written directories with transformers alone, one image at a time."""
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    right, same = torch.zeros(2), 0
    files = sorted(images.rglob("*.png"))
    models = [
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / part)
        for part in ("model", "out/pruned")
    ]
    for file in files:
        with Image.open(file) as image:
            inputs = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            chosen = [int(model(**inputs).logits.argmax()) for model in models]
        right += torch.tensor([LABELS[c] == file.parent.name for c in chosen])
        same += chosen[0] == chosen[1]
    accuracy, agreement = report.accuracy.metrics[:2]
    assert accuracy.dense is not None
    assert accuracy.sparse is not None
    assert agreement.agreement is not None
    assert accuracy.dense.value == pytest.approx(float(right[0]) / len(files))
    assert accuracy.sparse.value == pytest.approx(float(right[1]) / len(files))
    assert agreement.agreement.value == pytest.approx(same / len(files))


@pytest.mark.parametrize("asked", [True, False])
def test_a_convolutional_net_in_bfloat16_is_refused_before_any_work(
    images: Path, tmp_path: Path, *, asked: bool
) -> None:
    model_dir = write_model(tmp_path / "model", "resnet")
    options = ["--dtype", "bfloat16"] if asked else []
    if not asked:
        model = transformers.ResNetForImageClassification.from_pretrained(model_dir)
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(model_dir)
    refused = run_cli("build", model_dir, "-o", tmp_path / "out", "--calibration", images, *options)
    assert refused.code == 2
    assert "ResNetForImageClassification cannot be exported in bfloat16" in refused.err
    assert (f"in which {model_dir} is stored" in refused.err) != asked
    assert "pass --dtype float16 or float32." in refused.err
    assert not (tmp_path / "out").exists()


def test_an_image_model_without_images_or_processor_is_refused(
    images: Path, tmp_path: Path
) -> None:
    model_dir = write_model(tmp_path / "model", "vit")
    refused = run_cli("build", model_dir, "-o", tmp_path / "out")
    assert refused.code == 2
    assert "Image models have no built-in calibration data; pass --calibration" in refused.err
    (model_dir / "preprocessor_config.json").unlink()
    refused = run_cli("build", model_dir, "-o", tmp_path / "out", "--calibration", images)
    assert refused.code == 2
    assert "has no image processor that opens" in refused.err
    assert "add preprocessor_config.json" in refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_an_image_model_is_recovered(name: str, images: Path, tmp_path: Path) -> None:
    """Also one whose tensors have other names in the file than in the model."""
    model_dir, out = write_model(tmp_path / "model", name), tmp_path / "out"
    pruned = run_cli("prune", model_dir, "-o", out, "--calibration", images, "--method", "wanda")
    assert pruned.code == 0, pruned.err
    found = run_cli("recover", out, "--teacher", model_dir, "--recover", "3steps", "--json")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert (said["layers"], said["taken"]) == (MODELS[name][2], 3)
    assert run_cli("check", out / "recovered").code == 0
