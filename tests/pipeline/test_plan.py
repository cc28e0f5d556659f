"""`plan` from a saved profile, and `build --plan` on what it says; nothing here needs a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ANY_EMBEDDING, run_cli

import prox24_deploy as p24
from prox24_deploy.engines.cusparselt.planning import read_plan
from prox24_deploy.engines.cusparselt.profile import (
    GemmFormat,
    GemmShape,
    GemmTiming,
    GpuProfile,
    write_profile,
)
from prox24_deploy.model import mapped, offload
from prox24_deploy.pipeline import plan as planner

SHAPES = ("--shapes", "batch=1,2", "sequence=16")
SMALL = ("--calibration-tokens", "4096", *SHAPES)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPU on which only the layers with 64 inputs, the last of each block, gain from 2:4."""
    timings = [
        GemmTiming(
            shape=GemmShape(n=n, k=k, m=m),
            dense_us=parts * 10.0,
            sparse_us=5.0 if k == 64 else parts * 11.0,
        )
        # The last is the product of queries, keys and values.
        for n, k, parts in ((32, 32, 1), (64, 32, 1), (32, 64, 1), (96, 32, 3))
        for m in (16, 32)
    ]
    path = tmp_path_factory.mktemp("profile") / "gpu.json"
    write_profile(
        GpuProfile(gpu="an imagined card", driver="1", versions={}, gemms=tuple(timings)),
        path,
    )
    return path


@pytest.fixture(scope="module")
def planned(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path, profile: Path
) -> Path:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    run = run_cli(
        "plan", tiny_bert, "-o", out, "--calibration", prose, "--gpu-profile", profile, *SMALL
    )
    assert run.code == 0, run.err
    assert "2 × dense  32×64  2.00×  2.00×" in run.out
    assert "8 × " not in run.out
    assert "Times come from a saved profile of an imagined card" in run.out
    assert "Prune 2 of 12 layers on an imagined card in float16." in run.out
    return out


def test_a_decoder_is_planned_by_what_its_blocks_do(
    tiny_llama: Path, prose: Path, profile: Path, tmp_path: Path
) -> None:
    run = run_cli(
        "plan", tiny_llama, "-o", tmp_path / "plan.json", "--calibration", prose, "--json",
        "--no-sensitivity", "--gpu-profile", profile, *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    layers = json.loads(run.out)["layers"]
    assert {layer["choice"]["name"].rpartition(".")[2] for layer in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    for layer in layers:
        assert [t["shape"]["m"] for t in layer["choice"]["timings"]] == [16, 32]


def test_a_plan_has_times_losses_and_a_reason_for_every_layer(planned: Path) -> None:
    plan = json.loads(planned.read_text())
    assert plan["source"] == "profile"
    assert plan["metric"] == "1 - embedding cosine"
    assert len(plan["layers"]) == 12
    for layer in plan["layers"]:
        pays = layer["choice"]["k"] == 64
        assert layer["prune"] == pays
        assert (layer["loss"] is not None) == pays
        assert layer["reason"].startswith("timed faster" if pays else "timed slower: 0.91×")
        assert [t["shape"]["m"] for t in layer["choice"]["timings"]] == [16, 32]
    # Twelve GEMMs of 10 us, two of which take 5: the layers alone, as nothing was run.
    assert {shape["dense_ms"] for shape in plan["shapes"]} == {None}
    assert [shape["speedup"] for shape in plan["shapes"]] == pytest.approx([120 / 110] * 2)


def test_a_model_that_does_not_fit_is_planned_from_files(
    planned: Path, tiny_bert: Path, prose: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.dtype] = []
    keep = mapped.MappedFiles.keep

    def noted(files: mapped.MappedFiles, one: torch.Tensor) -> torch.Tensor:
        kept.append(one.dtype)
        return keep(files, one)

    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1)
    monkeypatch.setattr(mapped.MappedFiles, "keep", noted)
    options = p24.BuildOptions(
        text=p24.TextOptions(calibration=(prose,), calibration_tokens=4096),
        engine=p24.EngineOptions(backends=("cusparselt",), batches=(1, 2), sequences=(16,)),
        memory_limit_gib=1e-6,
    )
    found = p24.plan(tiny_bert, options, gpu_profile=profile)
    assert kept
    assert found.layers == read_plan(planned).layers


def test_a_sensitivity_that_does_not_fit_into_a_gpu_is_refused(
    tiny_bert: Path, prose: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    # The probe of a saved profile runs on the CPU.
    monkeypatch.setattr(offload, "free_on", lambda device, _: 0 if device == cuda else 2**40)
    monkeypatch.setattr(planner, "torch_device", lambda _: cuda)
    options = p24.BuildOptions(text=p24.TextOptions(calibration=(prose,), calibration_tokens=1024))
    with pytest.raises(p24.UsageError, match=r"memory of the GPU .* pass --device cpu, .* --no-se"):
        p24.plan(tiny_bert, options, gpu_profile=profile)


def test_a_build_prunes_what_the_plan_says_and_gives_its_reasons(
    planned: Path, tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    run = run_cli(
        "build", tiny_bert, "-o", tmp_path / "out", "--calibration", prose, "--plan", planned,
        *SMALL, *ANY_EMBEDDING, "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    layers = json.loads(run.out)["pruning"]["layers"]
    pruned = [layer["name"] for layer in layers if layer["status"] == "pruned"]
    assert pruned == [f"encoder.layer.{i}.output.dense" for i in (0, 1)]
    skipped = [layer for layer in layers if layer["status"] == "skipped"]
    reasons = {layer["reason"] for layer in skipped if layer["name"].startswith("encoder")}
    assert reasons == {"planned dense, timed slower: 0.91× at 16 rows, 0.91× at 32 rows"}


def test_a_budget_leaves_paying_layers_dense(tiny_bert: Path, prose: Path, profile: Path) -> None:
    run = run_cli(
        "plan", tiny_bert, "--calibration", prose, "--gpu-profile", profile, "--layers", "1",
        "--json", *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    layers = json.loads(run.out)["layers"]
    assert sum(layer["prune"] for layer in layers) == 1
    over = [layer for layer in layers if "over the budget of --layers 1" in layer["reason"]]
    assert len(over) == 1
    assert over[0]["choice"]["chosen"]


def test_where_nothing_pays_the_advice_is_to_prune_nothing(
    tiny_bert: Path, prose: Path, tmp_path: Path
) -> None:
    slow = GemmTiming(shape=GemmShape(n=32, k=32, m=16), dense_us=10.0, sparse_us=12.0)
    write_profile(
        GpuProfile(gpu="a card", driver="1", versions={}, gemms=(slow,)),
        tmp_path / "slow.json",
    )
    run = run_cli(
        "plan", tiny_bert, "-o", tmp_path / "plan.json", "--calibration", prose,
        "--gpu-profile", tmp_path / "slow.json", *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "Prune nothing: 2:4 does not pay at these shapes on a card in float16." in run.out
    assert "GEMM shapes are estimated from the nearest measured ones." in run.out
    run = run_cli(
        "build", tiny_bert, "-o", tmp_path / "out", "--calibration", prose, *SMALL,
        "--plan", tmp_path / "plan.json",
    )  # fmt: skip
    assert run.code == 2
    assert "prunes no layer, because 2:4 does not pay on a card" in run.err
    assert not (tmp_path / "out").exists()


def test_the_plan_of_another_model_is_refused_by_the_name_of_a_layer(
    planned: Path, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    run = run_cli(
        "prune", tiny_llama, "-o", tmp_path / "out", "--calibration", prose,
        "--calibration-tokens", "4096",
    )  # fmt: skip
    assert run.code == 0, run.err
    run = run_cli(
        "build", tiny_llama, "-o", tmp_path / "out", "--calibration", prose, *SMALL,
        "--plan", planned,
    )  # fmt: skip
    assert run.code == 2
    assert "The plan names layer encoder.layer.0.attention.output.dense" in run.err


def test_the_shipped_profile_plans_without_a_gpu_and_says_whose_times_they_are(
    tiny_bert: Path, prose: Path
) -> None:
    run = run_cli("plan", tiny_bert, "--calibration", prose, "--gpu-profile", "h100.json", *SMALL)
    assert run.code == 0, run.err
    out = " ".join(run.out.split())
    assert "Times come from a saved profile of NVIDIA H100 80GB HBM3" in out
    assert "Prune nothing: 2:4 does not pay at these shapes" in out


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPU whose 8-bit GEMMs take half as long, and 2:4 ones in fp8 a third of that."""
    times: dict[GemmFormat, tuple[float, float]] = {
        "float16": (12.0, 12.0), "fp8": (6.0, 2.0), "int8": (6.0, 6.0),
    }  # fmt: skip
    timings = [
        GemmTiming(
            shape=GemmShape(n=n, k=k, m=m),
            format=format,
            dense_us=parts * dense,
            sparse_us=parts * sparse,
        )
        for format, (dense, sparse) in times.items()
        for n, k, parts in ((32, 32, 1), (64, 32, 1), (32, 64, 1), (96, 32, 3))
        for m in (16, 32)
    ]
    path = tmp_path_factory.mktemp("several") / "gpu.json"
    published = "Times of somebody else."
    write_profile(
        GpuProfile(
            gpu="a card",
            driver="1",
            versions={},
            gemms=tuple(timings),
            published=published,
            copy_rate=1e9,
        ),
        path,
    )
    return path


def test_all_formats_of_a_profile_are_compared_and_the_one_asked_for_is_planned(
    tiny_bert: Path, prose: Path, several: Path, tmp_path: Path
) -> None:
    arguments = (
        "plan", tiny_bert, "-o", tmp_path / "plan.json", "--calibration", prose, "--gpu-profile",
        several, "--quantize", "fp8", "--no-sensitivity", *SMALL,
    )  # fmt: skip
    run = run_cli(*arguments)
    assert run.code == 0, run.err
    out = " ".join(run.out.split())
    assert "fp8 2:4 6.00× 6.00× fp8" in out
    assert "int8 dense 2.00× 2.00× int8" in out
    assert "fp8, 2:4 where it pays 0.024 6.00× 3.00×" in out
    assert "int8, dense 0.072 2.00× 1.00×" in out
    assert "Times of somebody else." in out
    assert "rounding inputs takes: 3 bytes of each value at 1000.00 TB/s, measured by a c" in out
    assert "no file that is 2:4 weight by weight runs sparse in NVFP4" in out
    assert "Prune 12 of 12 layers on a card in float16 and fp8." in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["dtype"], plan["quantize"]) == ("float16", "fp8")
    for layer in plan["layers"]:
        assert layer["prune"]
        assert layer["reason"].startswith("fastest as fp8 2:4: 6.00× at 16 rows")


def test_a_program_plans_the_format_of_its_options_or_another(
    tiny_bert: Path, prose: Path, several: Path
) -> None:
    options = p24.BuildOptions(
        quantize="fp8", text=p24.TextOptions(calibration=(prose,), calibration_tokens=1024),
        engine=p24.EngineOptions(batches=(2,), sequences=(8,)),
    )  # fmt: skip

    def format_of(**asked: Any) -> str:
        return p24.plan(
            tiny_bert, options, gpu_profile=several, sensitivity=False, **asked
        ).quantize

    assert format_of() == "fp8"
    assert format_of(quantize="none") == "none"


def test_a_format_that_a_profile_lacks_is_refused_before_any_work(
    tiny_bert: Path, prose: Path, several: Path, profile: Path
) -> None:
    arguments = ("plan", tiny_bert, "--calibration", prose, "--gpu-profile")
    run = run_cli(*arguments, profile, "--quantize", "fp8", *SMALL)
    assert run.code == 2
    assert "profile of an imagined card holds no times in fp8, only in float16" in run.err
    run = run_cli(*arguments, several, "--dtype", "bfloat16", *SMALL)
    assert run.code == 2
    assert "holds no times in bfloat16, only in float16, fp8, int8" in run.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_gpu_and_profile_there_is_nothing_to_plan_with(
    tiny_bert: Path, prose: Path
) -> None:
    run = run_cli("plan", tiny_bert, "--calibration", prose, *SMALL)
    assert run.code == 5
    assert "needs an NVIDIA GPU" in run.err
    assert "--gpu-profile" in run.err
