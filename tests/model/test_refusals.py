"""Checkpoints that cannot be built are refused by name, before a weight is read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_cli
from safetensors.torch import load_file, save_file
from tiny_models import configure

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.model import refusals
from prox24_deploy.model.directory import open_model_dir

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.fixture
def decoder(tmp_path: Path, tiny_qwen3: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config of "),
        ({"quantization_config": {"quant_method": "awq"}}, "config.json: awq"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "config.json: mxfp4"),
        ({"quantization_config": {"load_in_8bit": True}}, "config.json: load_in_8bit"),
        ({"quantization_config": {"quant_type": "torchao"}}, "config.json: torchao"),
        ({"quantization_config": "fp8"}, "config.json: fp8"),
        ({"compression_config": {"format": "pack-quantized"}}, "config.json: pack-quantized"),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            "text_config.quantization_config of config.json: fp8",
        ),
        ({"towers": [{"hf_quantizer": {"a": 1}}]}, "towers.0.hf_quantizer of config.json"),
    ],
)
def test_a_quantised_checkpoint_is_refused(
    decoder: Path, changes: dict[str, Any], where: str
) -> None:
    configure(decoder, **changes)
    # Nothing of the weights is needed to say so.
    (decoder / "model.safetensors").unlink()
    with pytest.raises(ModelDirError, match="is quantised or compressed") as caught:
        open_model_dir(decoder)
    assert where in str(caught.value)
    assert str(caught.value).endswith("pass the checkpoint that it was made from.")


@pytest.mark.parametrize("empty", [None, {}, False])
def test_a_quantiser_that_did_nothing_is_no_obstacle(decoder: Path, empty: object) -> None:
    configure(decoder, quantization_config=empty)
    open_model_dir(decoder)


@pytest.mark.parametrize(
    "name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"]
)
def test_the_file_of_a_quantiser_is_refused(decoder: Path, name: str) -> None:
    (decoder / name).write_text('{"bits": 4}', encoding="utf-8")
    with pytest.raises(ModelDirError, match=f"quantised or compressed \\({name}\\)"):
        open_model_dir(decoder)


@pytest.mark.parametrize(
    ("dtype", "beside", "refused"),
    [
        (torch.int8, "weight.SCB", True),
        (torch.uint8, "weight.absmax", True),
        (torch.float8_e4m3fn, "weight_scale_inv", True),
        # A plain cast has no scales, and loses nothing more than it has lost.
        (torch.float8_e4m3fn, "bias", False),
    ],
)
def test_weights_that_are_quantised_without_saying_so_are_refused(
    decoder: Path, dtype: torch.dtype, beside: str, *, refused: bool
) -> None:
    layer = "model.layers.0.mlp.up_proj"
    file = decoder / "model.safetensors"
    weights = load_file(file)
    weights[f"{layer}.weight"] = weights[f"{layer}.weight"].to(dtype)
    weights[f"{layer}.{beside}"] = torch.ones(1)
    save_file(weights, file, {"format": "pt"})
    if not refused:
        open_model_dir(decoder)
        return
    with pytest.raises(ModelDirError, match=f"\\(tensor {layer}.weight: {str(dtype)[6:]}\\)"):
        open_model_dir(decoder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"base_model_name_or_path": "x/y", "r": 8}', "an adapter of x/y (adapter_config.json)"),
        ('{"base_model_name_or_path": null}', "an adapter (adapter_config.json)"),
        ("{", "an adapter (adapter_config.json)"),
        ("[]", "an adapter (adapter_config.json)"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused(decoder: Path, text: str, told: str, *, whole: bool) -> None:
    """Also beside a whole model, to which transformers would add it where PEFT is installed."""
    (decoder / "adapter_config.json").write_text(text, encoding="utf-8")
    if not whole:
        (decoder / "config.json").unlink()
    with pytest.raises(ModelDirError, match="expected a whole model: merge it first") as caught:
        open_model_dir(decoder)
    assert told in str(caught.value)


def test_weights_of_four_bits_are_refused(decoder: Path) -> None:
    """Torch can neither copy nor widen them."""
    file = decoder / "model.safetensors"
    packed = torch.ones(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(load_file(file) | {"model.packed": packed}, file, {"format": "pt"})
    with pytest.raises(ModelDirError, match=r"tensor model\.packed: float4_e2m1fn_x2"):
        open_model_dir(decoder)


def test_an_adapter_inside_the_weights_is_refused(decoder: Path) -> None:
    file = decoder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    save_file(load_file(file) | {name: torch.ones(2, 2)}, file, {"format": "pt"})
    with pytest.raises(ModelDirError, match=f"holds tensor {name} of an adapter"):
        open_model_dir(decoder)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            "rope_parameters.full_attention.rope_type",
        ),
        (
            {"text_config": {"rope_scaling": {"type": "dynamic"}}},
            "text_config.rope_scaling.type",
        ),
    ],
)
def test_rope_that_depends_on_what_is_read_is_refused(
    decoder: Path, changes: dict[str, Any], where: str
) -> None:
    configure(decoder, **changes)
    with pytest.raises(ModelDirError, match="has RoPE of type 'dynamic'") as caught:
        open_model_dir(decoder)
    assert f"({where} of config.json)" in str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
        {"full_attention": {"rope_type": "llama3"}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_rope_with_fixed_frequencies_is_no_obstacle(decoder: Path, rope: object) -> None:
    configure(decoder, rope_parameters=rope, rope_scaling=rope)
    open_model_dir(decoder)


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_is_refused_only_where_transformers_cannot_export_it(
    decoder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(decoder, rope_scaling={"type": kind, **FACTORS})
    open_model_dir(decoder)
    monkeypatch.setattr(refusals, "_TRACEABLE_LONGROPE", (99, 0))
    with pytest.raises(ModelDirError, match=f"RoPE of type '{kind}'.*install transformers 99.0"):
        open_model_dir(decoder)


def test_a_refusal_costs_no_work_and_leaves_nothing(decoder: Path, tmp_path: Path) -> None:
    configure(decoder, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    for command in ("build", "prune"):
        done = run_cli(command, decoder, "-o", tmp_path / "out")
        assert done.code == 2
        assert "RoPE of type 'dynamic'" in done.err
    assert not (tmp_path / "out").exists()
