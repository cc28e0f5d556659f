"""What `package --vllm` writes, read as those libraries read it that are not vLLM itself."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import run_cli, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_llama
from torch import Tensor
from vllm_bundles import seal, write_bundle

from prox24_deploy.bundle.manifest import read_manifest
from prox24_deploy.core.errors import BundleError, SparsityLostError
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.packaging.package import package
from prox24_deploy.packaging.tensor_copy import write_copies
from prox24_deploy.packaging.vllm_reading import DECODERS, joined
from prox24_deploy.quantization.tensors import (
    apply_rounding,
    apply_weights,
    read_quantized,
    write_quantized,
)

BOTH: list[QuantizedFormat] = ["fp8", "int8"]
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: Path) -> Path:
    return write_bundle(tiny_llama, prose, tmp_path_factory.mktemp("vllm") / "llama")


@pytest.fixture(scope="session")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, prose: Path
) -> dict[QuantizedFormat, Path]:
    folder = tmp_path_factory.mktemp("vllm")
    return {form: write_bundle(tiny_llama, prose, folder / form, form) for form in BOTH}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def altered(bundle: Path, out: Path, name: str, value: Tensor) -> Path:
    """A bundle with one quantised tensor replaced."""
    shutil.copytree(bundle, out)
    path = out / "quantized" / "quantization.safetensors"
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    save_file(tensors | {name: value}, path, metadata=metadata)
    seal(out)
    return out


def test_a_model_in_16_bits_is_its_checkpoint_as_it_is(llama: Path, tmp_path: Path) -> None:
    before = snapshot(llama)
    out = tmp_path / "served"
    run = run_cli("package", llama, "--vllm", out)
    assert run.code == 0, run.err
    assert f"vllm: {out}" in run.out
    assert (
        "vLLM 0.19.0 and later run the 2:4 weights in 16 bits as dense ones. Not tried." in run.out
    )
    assert snapshot(llama) == before
    copied = snapshot(llama / "pruned")
    assert {name: snapshot(out)[name] for name in copied} == copied
    assert snapshot(out).keys() - copied.keys() == {"prox24.json", "torchao.json"}
    assert "quantization_config" not in config_of(out)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_directory_says_where_it_is_from(llama: Path, tmp_path: Path) -> None:
    package(llama, vllm=tmp_path / "out")
    origin = json.loads((tmp_path / "out" / "prox24.json").read_bytes())
    assert origin["manifest_sha256"] == read_manifest(llama).self_sha256
    assert (origin["verdict"], origin["format"]) == ("pass", "16-bit")
    assert len(origin["sparse_layers"]) == 14


@pytest.mark.parametrize("form", BOTH)
def test_quantised_tensors_have_the_names_types_and_shapes_that_vllm_reads(
    form: QuantizedFormat, quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    package(quantized[form], vllm=out)
    model = read_quantized(quantized[form] / "quantized" / "quantization.safetensors")
    plain, found = tensors_of(quantized[form] / "pruned"), tensors_of(out)
    for name, layer in model.layers.items():
        weight = found.pop(f"{name}.weight")
        assert weight.dtype == DTYPES[form]
        assert torch.equal(weight.float(), layer.weight.float())
        scale = found.pop(f"{name}.weight_scale")
        assert (scale.dtype, scale.shape) == (torch.float32, (len(weight), 1))
        assert torch.equal(scale[:, 0], layer.weight_scale)
        assert found.pop(f"{name}.input_scale").tolist() == [layer.input_scale]
        del plain[f"{name}.weight"]
    assert any(layer.output_scale for layer in model.layers.values()) == (form == "int8")
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, model.folded.get(name, plain[name])), name
    assert bool(model.folded) == (form == "int8")


@pytest.mark.parametrize("form", BOTH)
def test_the_index_places_every_tensor_and_check_proves_them(
    form: QuantizedFormat, quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    package(quantized[form], vllm=out)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    places: dict[str, str] = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            places |= dict.fromkeys(handle.keys(), file.name)
            assert handle.metadata()["format"] == "pt"
    assert index["weight_map"] == places
    sizes = (t.numel() * t.itemsize for t in tensors_of(out).values())
    assert index["metadata"]["total_size"] == sum(sizes)
    run = run_cli("check", out)
    assert run.code == 0, run.err
    assert "Weights proven 2:4: 14, not 2:4: 0, not proven: 0, need not be: 15." in run.out


def test_a_single_file_has_no_index_the_same_bytes_again_and_keeps_bfloat16(
    prose: Path, tmp_path: Path
) -> None:
    model = write_tiny_llama(tmp_path / "m", dtype=torch.bfloat16)
    bundle = write_bundle(model, prose, tmp_path / "bundle", "fp8")
    package(bundle, vllm=tmp_path / "a")
    package(bundle, vllm=tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").glob("model*")} == {"model.safetensors"}
    name = "model.embed_tokens.weight"
    kept = tensors_of(tmp_path / "a")[name]
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, tensors_of(model)[name])
    assert (
        int.from_bytes((tmp_path / "a" / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    )


@pytest.mark.parametrize("form", BOTH)
def test_the_configuration_has_the_keys_that_vllm_chooses_a_scheme_by(
    form: QuantizedFormat, quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    """`_is_fp8_w8a8`, `_is_static_tensor_w8a8` and `is_activation_quantization_format` of vLLM."""
    package(quantized[form], vllm=tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    kind = {"fp8": "float", "int8": "int"}[form]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == f"{kind}-quantized"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    both = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False}
    assert group["weights"] == both | {"strategy": "channel"}
    assert group["input_activations"] == both | {"strategy": "tensor"}
    assert set(config["ignore"]) == {"lm_head", "model.embed_tokens"}
    # vLLM 0.33.0 refuses a configuration that names 2:4.
    assert "sparsity_config" not in config


@pytest.mark.parametrize("form", BOTH)
def test_compressed_tensors_computes_what_was_measured(
    form: QuantizedFormat, quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out = tmp_path / "out"
    package(quantized[form], vllm=out)
    tokens = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    auto: Any = transformers.AutoModelForCausalLM
    ours = auto.from_pretrained(quantized[form] / "pruned", dtype=torch.float32)
    theirs, info = auto.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    model = read_quantized(quantized[form] / "quantized" / "quantization.safetensors")
    with torch.no_grad():
        plain = ours(tokens).logits
        apply_weights(ours, model)
        # vLLM rounds no outputs.
        plainer = {name: replace(each, output_scale=None) for name, each in model.layers.items()}
        apply_rounding(ours, replace(model, layers=plainer))
        expected, found = ours(tokens).logits, theirs(tokens).logits
    assert not torch.equal(expected, plain)
    assert torch.equal(found, expected)


def test_compressed_tensors_reads_what_is_declared_as_sparse(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    why = "compressed-tensors is not installed"
    formats = pytest.importorskip("compressed_tensors.config", reason=why)
    schemes = pytest.importorskip("compressed_tensors.quantization", reason=why)
    package(quantized["fp8"], vllm=tmp_path / "out", vllm_sparse=True)
    config = config_of(tmp_path / "out")["quantization_config"]
    sparsity = formats.SparsityCompressionConfig.model_validate(config["sparsity_config"])
    assert sparsity.sparsity_structure == "2:4"
    assert schemes.QuantizationConfig.model_validate(config).format == "float-quantized"


@pytest.mark.parametrize("form", [None, *BOTH])
def test_layers_are_declared_as_sparse_where_that_is_asked_for(
    form: QuantizedFormat | None,
    llama: Path,
    quantized: dict[QuantizedFormat, Path],
    tmp_path: Path,
) -> None:
    bundle = llama if form is None else quantized[form]
    run = run_cli("package", bundle, "--vllm", tmp_path / "out", "--vllm-sparse", "--json")
    assert run.code == 0, run.err
    (note,) = json.loads(run.out)["notes"]
    assert "vLLM 0.18.1 has kernels for 2:4 weights" in note
    assert "vLLM 0.19.0 and later refuse this directory" in note
    config = config_of(tmp_path / "out")["quantization_config"]
    assert bool(config["config_groups"]) == (form is not None)
    sparsity = config["sparsity_config"]
    assert (sparsity["format"], sparsity["sparsity_structure"]) == ("dense", "2:4")
    assert len(sparsity["targets"]) == 14
    assert not (tmp_path / "out" / "torchao.json").exists()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_fused_layer_that_is_dense_in_part_is_not_declared(
    *, sparse: bool, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    """Kernels and packers for 2:4 drop what is in the way, so that a dense part would be lost."""
    bundle = write_bundle(tiny_llama, prose, tmp_path / "bundle", dense=("v_proj",))
    found = package(bundle, vllm=tmp_path / "out", vllm_sparse=sparse)
    assert any(
        "Dense in part, so declared in none: model.layers.0.self_attn.qkv_proj, "
        "model.layers.1.self_attn.qkv_proj." in note
        for note in found.notes
    )
    if sparse:
        named = config_of(tmp_path / "out")["quantization_config"]["sparsity_config"]["targets"]
    else:
        torchao = json.loads((tmp_path / "out" / "torchao.json").read_bytes())
        named = torchao["_data"]["module_fqn_to_config"]
    assert not any(name.rpartition(".")[2][0] in "qkv" for name in named)
    assert any(name.endswith("o_proj") for name in named)


def test_torchao_is_told_the_layers_of_vllm_by_their_fused_names(
    llama: Path, tmp_path: Path
) -> None:
    package(llama, vllm=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "torchao.json").read_bytes())
    modules = told["_data"]["module_fqn_to_config"]
    names = ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
    assert sorted(modules) == [f"model.layers.{i}.{name}" for i in (0, 1) for name in names]


def test_torchao_makes_its_configuration_of_it(llama: Path, tmp_path: Path) -> None:
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    package(llama, vllm=tmp_path / "out")
    code = """
import json, sys
from torchao.core.config import config_from_dict
config = config_from_dict(json.load(open(sys.argv[1])))
print(config.module_fqn_to_config["model.layers.0.self_attn.qkv_proj"].packing_format.name)
"""
    # In a process of its own, for its sources give warnings, which are errors here.
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out" / "torchao.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "SPARSE_2D_DATA_2D_METADATA"


def test_opt_names_its_layers_as_vllm_does() -> None:
    (layer,) = joined(["decoder.layers.0.self_attn.q_proj"], DECODERS["OPTForCausalLM"])
    assert layer.name == "model.decoder.layers.0.self_attn.qkv_proj"
    assert layer.parts == tuple(f"decoder.layers.0.self_attn.{x}_proj" for x in "qkv")


def test_layers_left_in_16_bits_are_named_and_ignored(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(quantized["fp8"], tmp_path / "bundle")
    leave_out(bundle, "model.layers.0.mlp.down_proj")
    found = package(bundle, vllm=tmp_path / "out")
    assert any("Not quantised: model.layers.0.mlp.down_proj." in note for note in found.notes)
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.down_proj" in ignored
    tensors = tensors_of(tmp_path / "out")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16
    assert run_cli("check", tmp_path / "out").code == 0


def leave_out(bundle: Path, layer: str) -> None:
    """Make a layer of a bundle one that stays in 16 bits."""
    path = bundle / "quantized" / "quantization.safetensors"
    model = read_quantized(path)
    rest = {name: each for name, each in model.layers.items() if name != layer}
    axes = {name: axis for name, axis in model.axes.items() if name != layer}
    write_quantized(replace(model, layers=rest, axes=axes), path)
    record = bundle / "stages" / "quantize.json"
    content = json.loads(record.read_bytes())
    for each in content["layers"]:
        if each["name"] == layer:
            each["reason"] = "too much is lost"
    record.write_text(json.dumps(content), encoding="utf-8")
    seal(bundle)


def test_a_fused_layer_that_is_quantised_in_part_is_refused(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(quantized["int8"], tmp_path / "bundle")
    leave_out(bundle, "model.layers.1.mlp.up_proj")
    run = run_cli("package", bundle, "--vllm", tmp_path / "out")
    assert run.code == 2
    assert "wants one format for all, but model.layers.1.mlp.up_proj was left in 16 bits" in run.err
    assert not (tmp_path / "out").exists()


def test_parts_with_two_input_scales_are_refused(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.k_proj.input_scale"
    bundle = altered(quantized["fp8"], tmp_path / "bundle", name, torch.tensor(3.5))
    with pytest.raises(BundleError, match=r"takes one input scale for all, but they have \[.*3\.5"):
        package(bundle, vllm=tmp_path / "out")


def test_numbers_that_are_not_24_are_found_and_nothing_is_left(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    full = torch.ones(32, 32).to(torch.float8_e4m3fn)
    bundle = altered(quantized["fp8"], tmp_path / "bundle", name, full)
    with pytest.raises(SparsityLostError, match=r"o_proj.* is not 2:4 along axis 1"):
        package(bundle, vllm=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_quantised_tensor_of_no_tensor_or_of_another_shape_is_refused(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path
) -> None:
    lone = altered(quantized["fp8"], tmp_path / "lone", "other.weight", torch.ones(4))
    with pytest.raises(BundleError, match=r"other\.weight matches 0 tensors of the checkpoint"):
        package(lone, vllm=tmp_path / "out")
    wide = altered(quantized["fp8"], tmp_path / "wide", "model.norm.weight", torch.ones(4))
    with pytest.raises(BundleError, match=r"norm\.weight is \(4,\), but \(32,\) in the checkpoint"):
        package(wide, vllm=tmp_path / "out")


def test_a_file_that_changes_while_it_is_copied_is_found(
    quantized: dict[QuantizedFormat, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(quantized["fp8"], tmp_path / "bundle")

    def change(*given: Any) -> int:
        with (bundle / "pruned" / "model-00001-of-00003.safetensors").open("ab") as stream:
            stream.write(b" ")
        return write_copies(*given)

    monkeypatch.setattr("prox24_deploy.packaging.vllm.write_copies", change)
    with pytest.raises(BundleError, match=r"00001-of-00003.* changed while it was read"):
        package(bundle, vllm=tmp_path / "out")


def test_models_that_vllm_is_not_known_to_run_are_refused(llama: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(llama, tmp_path / "bundle")
    model = read_manifest(bundle).model
    assert model is not None
    for other, said in (
        (replace(model, task="feature-extraction"), "is for feature-extraction, and only decoders"),
        (replace(model, architecture="BloomForCausalLM"), "BloomForCausalLM, which has not been"),
        (None, "The manifest names no model"),
    ):
        seal(bundle, model=other)
        run = run_cli("package", bundle, "--vllm", tmp_path / "out")
        assert run.code == 2
        assert said in run.err
    assert not (tmp_path / "out").exists()


def test_of_a_gpt2_only_16_bits_are_written(tiny_gpt2: Path, prose: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tiny_gpt2, prose, tmp_path / "bundle")
    sparse = run_cli("package", bundle, "--vllm", tmp_path / "out", "--vllm-sparse")
    assert sparse.code == 2
    assert "compressed-tensors knows Linear layers, not Conv1D" in sparse.err
    run = run_cli("package", bundle, "--vllm", tmp_path / "out")
    assert run.code == 0, run.err
    assert not (tmp_path / "out" / "torchao.json").exists()
    assert run_cli("check", tmp_path / "out").code == 0


def test_refusals_before_any_work(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out, said in (
        (tmp_path / "there", "exists already; remove it"),
        (llama / "served", "lies in the bundle"),
    ):
        run = run_cli("package", llama, "--vllm", out)
        assert run.code == 2
        assert said in run.err
    alone = run_cli("package", llama, "--vllm-sparse", "--checksums", tmp_path / "sums")
    assert alone.code == 2
    assert "--vllm-sparse has no effect without --vllm" in alone.err
    assert not (tmp_path / "sums").exists()


def test_a_model_with_no_whole_sparse_layer_has_none_to_declare(
    tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    dense = ("v_proj", "up_proj", "o_proj", "down_proj")
    bundle = write_bundle(tiny_llama, prose, tmp_path / "bundle", dense=dense)
    with pytest.raises(BundleError, match="No layer of the model can be declared as 2:4"):
        package(bundle, vllm=tmp_path / "out", vllm_sparse=True)
