"""The cuSPARSELt backend around a stand-in for its GPU."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from command_line import ANY_EMBEDDING, run_cli, snapshot
from fake_cuda import CARD, DENSE, SPARSE, Machine, install
from torch import nn

from prox24_deploy.bundle.bundle import open_bundle
from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.core.errors import EngineError, ModelDirError
from prox24_deploy.core.records import Compilation, Engine, OnnxModel
from prox24_deploy.core.shapes import Shape
from prox24_deploy.engines.cusparselt import cuda_graph, inductor, kernels
from prox24_deploy.engines.cusparselt.backend import CuSparseLt
from prox24_deploy.engines.cusparselt.cuda_graph import GraphSession
from prox24_deploy.engines.cusparselt.gemm import measure_gemms, time_gemm
from prox24_deploy.engines.cusparselt.linear import SparseLinear, two_four_layers
from prox24_deploy.engines.cusparselt.profile import GEMM_FORMATS, GemmShape, GpuProfile
from prox24_deploy.engines.cusparselt.torch_model import open_torch_model
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.layers import layer_at
from prox24_deploy.pipeline.stages.compile import STAGE as COMPILE
from prox24_deploy.quantization.formats import to_numbers
from prox24_deploy.quantization.tensors import QuantizedLayer, QuantizedModel, write_quantized

SHAPES = ("--shapes", "batch=1,2", "sequence=16")
SMALL = (
    "--calibration-tokens", "4096", "--evaluation-tokens", "1024", "--method", "magnitude", *SHAPES,
    *ANY_EMBEDDING,
)  # fmt: skip
LAYERS = 12
# Queries, keys and values of both blocks are one product each.
PRODUCTS = 8
COMPILE_GRAPHS = torch.compile


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, prose: Path) -> Path:
    """A whole build, on the stand-in."""
    out = tmp_path_factory.mktemp("cusparselt") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        run = run_cli(
            "build", tiny_bert, "-o", out, "--calibration", prose, "--dtype", "float16",
            "--backend", "cusparselt", "--device", "cpu", *SMALL,
        )  # fmt: skip
    assert run.code == 0, run.err
    return out


def backend_of(tiny_bert: Path) -> CuSparseLt:
    recipe = parse_recipe(shipped_recipes()["bert"], "bert")
    sha256 = open_model_dir(tiny_bert).sha256
    return CuSparseLt(
        dense=tiny_bert,
        dense_sha256=sha256,
        pruned="pruned",
        quantized="quantized/quantization.safetensors",
        recipe=recipe,
        options=EngineOptions(batches=(1, 2), sequences=(16,)),
    )


def engines_of(bundle: Path) -> dict[str, Engine]:
    with open_bundle(bundle, existing=True) as opened:
        return {e.twin: e for e in opened.load(COMPILE).engines}


def two_four(n: int, k: int) -> torch.Tensor:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).half()
    weight.view(n, -1, 4)[..., 2:] = 0
    return weight


def test_a_build_reports_which_layers_run_sparse_and_what_they_compute(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    (evidence,) = report["sparsity"]["engines"]
    assert (evidence["backend"], evidence["device"]) == ("cusparselt", CARD)
    assert (evidence["eligible"], evidence["chosen"]) == (LAYERS, LAYERS)
    dense = [layer for layer in evidence["layers"] if not layer["chosen"]]
    assert [(layer["module"], layer["reason"]) for layer in dense] == [("pooler.dense", "not 2:4")]
    for layer in (layer for layer in evidence["layers"] if layer["chosen"]):
        assert layer["reason"].startswith("timed faster: 1.32× at 16 rows, 1.32× at 32 rows")
        assert layer["reason"].endswith(f"kernel {SPARSE}")
    checks = [c for c in report["checks"] if c["name"].startswith("cusparselt ")]
    assert any(check["kind"] == "numerics" and check["verdict"] == "pass" for check in checks)
    assert {row["device"] for row in report["latency"]} == {CARD}
    for row in report["latency"]:
        # Eight products with the fastest algorithm, k divided by two: 0.6 ms less for each.
        assert row["dense"]["median_ms"] == 10.0
        assert row["sparse"]["median_ms"] == pytest.approx(10.0 - PRODUCTS * 0.6)
        assert row["gated"]
        assert row["verdict"] == "pass"
    assert report["verdict"] == "pass"
    sparse = bundle / "engines" / "cusparselt" / "sparse"
    assert {p.name for p in sparse.iterdir()} == {"engine.json", "evidence.json", "gemms.json"}


def test_engines_hold_less_and_compute_what_the_pruned_model_computes(
    bundle: Path, tiny_bert: Path, machine: Machine
) -> None:
    engines = engines_of(bundle)
    assert engines["sparse"].size_bytes < engines["dense"].size_bytes
    backend = backend_of(tiny_bert)
    pruned = open_torch_model(open_model_dir(bundle / "pruned"), backend.recipe, "float16")
    feeds = pruned.feeds(Shape(batch=2, sequence=16), seed=3)
    expected = pruned.run(feeds)[0].float().numpy()
    before = machine.products
    with backend.open(bundle, engines["sparse"]) as session:
        found = session.infer(feeds)
    assert machine.products - before >= PRODUCTS
    (name,) = found
    np.testing.assert_allclose(found[name], expected, atol=0.02 * np.abs(expected).max())


def quantised_bundle(bundle: Path, out: Path, backend: CuSparseLt) -> None:
    """A pruned model with all of its 2:4 layers but one in int8, and one more that is dense."""
    (out / "quantized").mkdir(parents=True)
    (out / "pruned").symlink_to(bundle / "pruned")
    model = load_model(open_model_dir(out / "pruned"), backend.recipe, torch.device("cpu"))
    names = [*sorted(two_four_layers(model))[1:], "pooler.dense"]
    layers = {}
    for name in names:
        weight = layer_at(model, name).weight
        scale = weight.abs().amax(1) / 127
        layers[name] = QuantizedLayer(
            weight=to_numbers(weight / scale[:, None], 1.0, torch.int8),
            weight_scale=scale,
            input_scale=0.05,
        )
    write_quantized(QuantizedModel(format="int8", layers=layers), out / backend.quantized)


def test_a_quantised_twin_multiplies_in_eight_bits_what_was_decided(
    bundle: Path, tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    """Held against the same numbers multiplied in 16 bits, and layers against dense int8."""
    backend = backend_of(tiny_bert)
    quantised_bundle(bundle, tmp_path, backend)
    model = OnnxModel(
        path="onnx/sparse/model.onnx", dtype="float16", opset=20, sha256="0" * 64, size_bytes=1
    )
    engine = backend.build(tmp_path, model, Path("engines"), twin="sparse")
    evidence = backend.evidence(tmp_path, engine, ())
    assert f"{LAYERS} of {LAYERS + 1} layers in int8" in evidence.summary
    reasons = {layer.module: layer.reason for layer in evidence.layers if layer.chosen}
    assert len(reasons) == LAYERS
    first = min(reasons)
    assert reasons.pop(first).startswith("timed faster: 1.32× at 16 rows")
    assert all(r.startswith("timed faster than dense int8: ") for r in reasons.values())
    assert evidence.numerics
    assert all(check.passed for check in evidence.numerics)
    with backend.open(tmp_path, engine) as session:
        feeds = open_torch_model(open_model_dir(tiny_bert), backend.recipe, "float16").feeds(
            Shape(batch=2, sequence=16)
        )
        assert np.isfinite(session.infer(feeds)["last_hidden_state"].astype(float)).all()
    tensors = tmp_path / backend.quantized
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    with (
        pytest.raises(EngineError, match=r"quantization.safetensors has changed since .*; comp"),
        backend.open(tmp_path, engine),
    ):
        pass


def test_a_quantised_twin_that_computes_something_else_is_refused(
    bundle: Path, tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    backend = backend_of(tiny_bert)
    quantised_bundle(bundle, tmp_path, backend)
    machine.error = 1.05
    model = OnnxModel(
        path="onnx/sparse/model.onnx", dtype="float16", opset=20, sha256="0" * 64, size_bytes=1
    )
    with pytest.raises(EngineError, match=r"Layer .*query.* differs from the products of its own"):
        backend.build(tmp_path, model, Path("engines"), twin="sparse")


def test_the_same_build_again_runs_nothing(
    bundle: Path, tiny_bert: Path, prose: Path, machine: Machine
) -> None:
    before = snapshot(bundle)
    run = run_cli(
        "build", tiny_bert, "-o", bundle, "--calibration", prose, "--dtype", "float16",
        "--backend", "cusparselt", "--device", "cpu", *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert snapshot(bundle) == before
    assert machine.products == 0


def test_a_float32_model_is_refused(tiny_bert: Path, tmp_path: Path, machine: Machine) -> None:
    model = OnnxModel(
        path="onnx/sparse/model.onnx", dtype="float32", opset=20, sha256="0" * 64, size_bytes=1
    )
    with pytest.raises(EngineError, match="cuSPARSELt has no float32 kernels; export with"):
        backend_of(tiny_bert).build(tmp_path, model, Path("engines"), twin="dense")
    assert list(tmp_path.iterdir()) == []


def dense_engine(folder: Path, backend: CuSparseLt) -> Engine:
    model = OnnxModel(
        path="onnx/dense/model.onnx", dtype="float16", opset=20, sha256="0" * 64, size_bytes=1
    )
    return backend.build(folder, model, Path("engines"), twin="dense")


def test_a_model_that_does_not_compile_runs_all_the_same_and_says_why(
    tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    backend = backend_of(tiny_bert)
    compiled = dense_engine(tmp_path, backend).compilation
    assert compiled is not None
    assert (compiled.reason, compiled.seconds > 0) == ("", True)
    assert json.loads((tmp_path / "engines" / "engine.json").read_text())["compiled"] is True
    machine.obstacle = "there is no C++ compiler\nsecond line"
    engine = dense_engine(tmp_path, backend)
    assert engine.compilation is not None
    assert "there is no C++ compiler" in engine.compilation.reason
    assert "second line" not in engine.compilation.reason
    assert json.loads((tmp_path / "engines" / "engine.json").read_text())["compiled"] is False
    with backend.open(tmp_path, engine) as session:
        feeds = open_torch_model(open_model_dir(tiny_bert), backend.recipe, "float16").feeds(
            Shape(batch=2, sequence=16)
        )
        assert set(session.infer(feeds)) == {"last_hidden_state"}


def test_eager_is_an_option_and_no_failure(
    tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    backend = backend_of(tiny_bert)
    eager = replace(backend, options=replace(backend.options, eager=True))
    assert dense_engine(tmp_path, eager).compilation == Compilation(reason="--eager")
    refused = run_cli("build", tiny_bert, "--eager", "--backend", "onnxruntime")
    assert refused.code == 2
    assert "--eager has no effect on backend onnxruntime; add --backend cusparselt" in " ".join(
        refused.err.split()
    )


def test_a_compressed_layer_is_one_operator_of_the_graph(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", COMPILE_GRAPHS)
    monkeypatch.setattr(inductor, "BACKEND", "eager")
    layer = SparseLinear(two_four(32, 64), None, {}, "a layer")
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).half()
    compiled = inductor.CompiledModule(layer, [(hidden.shape,)])
    assert torch.equal(compiled(hidden), layer(hidden))  # type: ignore[arg-type]
    assert compiled(hidden[:1]).shape == (1, 3, 32)  # type: ignore[attr-defined]
    compiled.close()


def test_a_shape_without_a_graph_of_its_own_shares_one() -> None:
    graphs: list[bool] = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(True)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "BACKEND", count)
        module = inductor.CompiledModule(nn.Linear(4, 4), [(torch.Size((2, 4)),)])
        for rows in (2, 3, 5, 7, 2, 9):
            assert module(torch.zeros(rows, 4)).shape == (rows, 4)  # type: ignore[attr-defined]
        assert len(graphs) == 2
        module.close()


def test_damaged_or_foreign_engine_files_are_refused(
    bundle: Path, tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    backend, engine = backend_of(tiny_bert), engines_of(bundle)["sparse"]
    missing = replace(engine, path="engines/nowhere/engine.json")
    with pytest.raises(EngineError, match=r"cannot be read .*; compile the model again"):
        backend.evidence(bundle, missing, ())
    with (
        pytest.raises(EngineError, match=r"cannot be read .*; compile"),
        backend.open(bundle, missing),
    ):
        pass
    record = json.loads((bundle / engine.path).read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**record, "model_sha256": "0" * 64}))
    (tmp_path / "pruned").symlink_to(bundle / "pruned")
    moved = replace(engine, path="engine.json")
    with pytest.raises(EngineError, match="has changed since"), backend.open(tmp_path, moved):
        pass


def test_the_dense_twin_of_another_model_is_refused(
    bundle: Path, tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    """The dense weights stay where the user has them, so that they may have been replaced."""
    other = replace(backend_of(tiny_bert), dense_sha256="0" * 64)
    model = OnnxModel(
        path="onnx/dense/model.onnx", dtype="float16", opset=20, sha256="0" * 64, size_bytes=1
    )
    with pytest.raises(ModelDirError, match=r"is not the model that .* was made from; restore it"):
        other.build(tmp_path, model, Path("engines"), twin="dense")
    with (
        pytest.raises(ModelDirError, match="is not the model that"),
        other.open(bundle, engines_of(bundle)["dense"]),
    ):
        pass


def test_outputs_that_differ_stop_the_build(
    bundle: Path, tiny_bert: Path, tmp_path: Path, machine: Machine
) -> None:
    machine.error = 2.0
    (tmp_path / "pruned").symlink_to(bundle / "pruned")
    model = OnnxModel(
        path="onnx/sparse/model.onnx", dtype="float16", opset=20, sha256="0" * 64, size_bytes=1
    )
    message = "Output last_hidden_state of the compressed model differs from the same weights"
    with pytest.raises(EngineError, match=message):
        backend_of(tiny_bert).build(tmp_path, model, Path("engines"), twin="sparse")
    assert not (tmp_path / "engines" / "engine.json").exists()


def test_a_plan_is_measured_on_the_gpu(
    tiny_bert: Path, prose: Path, tmp_path: Path, machine: Machine
) -> None:
    run = run_cli(
        "plan", tiny_bert, "-o", tmp_path / "plan.json", "--calibration", prose, "--device", "cpu",
        "--calibration-tokens", "4096", "--save-profile", tmp_path / "gpu.json", *SHAPES,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert f"Prune {LAYERS} of {LAYERS} layers on {CARD} in float16." in run.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["source"] == "measured"
    for shape in plan["shapes"]:
        assert shape["dense_ms"] == 10.0
        # Each GEMM takes 10 ms dense on the stand-in and 9.4 sparse; the model saves them all.
        assert shape["speedup"] == pytest.approx(10.0 / (10.0 - PRODUCTS * 0.6))
    assert {gemm["algorithm"] for gemm in plan["profile"]["gemms"]} == {1}
    assert json.loads((tmp_path / "gpu.json").read_text()) == plan["profile"]
    before = machine.products
    run = run_cli(
        "build", tiny_bert, "-o", tmp_path / "out", "--calibration", prose, "--device", "cpu",
        "--dtype", "float16", "--backend", "cusparselt", "--plan", tmp_path / "plan.json", *SMALL,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert machine.products > before


def test_a_plan_times_the_8_bit_format_that_is_asked_for(
    tiny_bert: Path, prose: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "plan", tiny_bert, "--calibration", prose, "--device", "cpu", "--no-sensitivity", "--json",
        "--calibration-tokens", "4096", *SHAPES, "--quantize",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    run = run_cli(*arguments, "fp8")
    assert run.code == 2
    assert "fp8 cannot be timed here: fp8 needs compute capability 8.9" in run.err
    run = run_cli(*arguments, "int8")
    assert run.code == 0, run.err
    plan = json.loads(run.out)
    assert plan["quantize"] == "int8"
    assert {gemm["format"] for gemm in plan["profile"]["gemms"]} == {"float16", "int8"}
    # Every product takes as long on the stand-in, so that none is worth 8 bits.
    for layer in plan["layers"]:
        way = {"format": "float16", "sparse": True}
        assert layer["ways"] == {"none": way, "int8": way}
        assert layer["reason"].startswith("fastest as float16 2:4")


def test_a_product_of_few_rows_is_timed_with_its_padding(machine: Machine) -> None:
    empty = GpuProfile(gpu="a card", driver="1", versions={}, gemms=())
    shape = GemmShape(n=32, k=64, m=3)
    for format in GEMM_FORMATS:
        if format == "fp8":
            continue  # The dense product of the stand-in would be that of a CPU.
        timing = measure_gemms(empty, [shape], format, lambda *_: None).known(shape, format)
        assert timing is not None
        assert timing.shape.m == 3


def test_only_the_algorithms_asked_for_are_tried(machine: Machine) -> None:
    empty = GpuProfile(gpu="a card", driver="1", versions={}, gemms=())
    shape = GemmShape(n=32, k=64, m=16)
    found = measure_gemms(empty, [shape], "float16", lambda *_: None, {2}).known(shape)
    assert found is not None
    assert found.algorithm == 2


def test_the_fastest_algorithm_that_works_is_taken(machine: Machine) -> None:
    shape = GemmShape(n=32, k=64, m=16)
    empty = GpuProfile(gpu="a card", driver="1", versions={}, gemms=())
    timing = measure_gemms(empty, [shape], "bfloat16", lambda *_: None).known(shape, "bfloat16")
    assert timing is not None
    assert timing.algorithm == 1
    assert timing.dense_us == 2500.0
    assert timing.sparse_us == pytest.approx(1900.0)
    with pytest.raises(EngineError, match="has no algorithm that works for GemmShape"):
        time_gemm(shape, "float16", [])


def test_known_shapes_are_not_measured_again(machine: Machine) -> None:
    empty = GpuProfile(gpu="a card", driver="1", versions={}, gemms=())
    shape = GemmShape(n=32, k=64, m=16)
    seen: list[tuple[str, int, int]] = []
    once = measure_gemms(empty, [shape, shape], "float16", lambda *step: seen.append(step))
    assert seen == [("algorithm", 4, 4), ("gemm", 0, 1), ("gemm", 1, 1)]
    products = machine.products
    assert measure_gemms(once, [shape], "float16", lambda *_: None) == once
    assert machine.products == products


@pytest.mark.parametrize("bias", [False, True])
def test_a_compressed_layer_multiplies_as_a_dense_one(machine: Machine, *, bias: bool) -> None:
    weight = two_four(32, 64)
    offset = torch.arange(32).half() if bias else None
    layer = SparseLinear(weight, offset, {6: 2})
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).half()
    expected = nn.functional.linear(hidden.float(), weight.float(), None if offset is None
                                    else offset.float())  # fmt: skip
    found = layer(hidden)
    assert found.shape == (2, 3, 32)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)
    assert machine.gains == [0.3]


class Doubling(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor]:
        if first.shape[0] == 13:
            raise RuntimeError("no stream\nsecond line")
        return (2 * first + second,)


def test_a_session_is_fed_by_name_at_any_shape(machine: Machine) -> None:
    session = GraphSession(Doubling(), ["first", "second"], ["sum"], "the doubling model")
    first, second = np.full(4, 4, np.float32), np.arange(4, dtype=np.float32)
    for one, other in ((first, second), (second, first), (np.tile(first, 2), np.tile(second, 2))):
        found = session.infer({"second": other, "first": one})
        np.testing.assert_array_equal(found["sum"], 2 * one + other)
    times = session.latencies_ms({"first": first, "second": second}, runs=3, warmup=1)
    np.testing.assert_array_equal(times, [10.0, 10.0, 10.0])
    with pytest.raises(EngineError, match="missing second, not known third; feed exactly first, s"):
        session.infer({"first": first, "third": second})
    with pytest.raises(EngineError, match=r"inputs of shape \(13,\), \(13,\): no stream\.$"):
        session.infer(dict.fromkeys(("first", "second"), np.zeros(13, np.float32)))
    session.close()
    with pytest.raises(EngineError, match="session of the doubling model is closed"):
        session.infer({"first": first, "second": second})


def test_what_is_timed_again_is_not_sent_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A past has gigabytes; what is inferred is sent, for it may have been written to."""
    sent: list[float] = []
    to_tensor = cuda_graph.to_tensor

    def note(array: np.ndarray) -> torch.Tensor:
        sent.append(float(array[0]))
        return to_tensor(array)

    monkeypatch.setattr(cuda_graph, "to_tensor", note)
    session = GraphSession(Doubling(), ["first", "second"], ["sum"], "the doubling model")
    past, one, two = (np.full(4, value, np.float32) for value in (7, 1, 2))
    for token in (one, one, two):
        session.latencies_ms({"first": past, "second": token}, runs=1, warmup=0)
    assert sent == [7.0, 1.0, 2.0]
    past[:] = 8
    assert session.infer({"first": past, "second": two})["sum"].tolist() == [18.0] * 4
    session.close()


def test_bfloat16_keeps_its_bits_on_the_way_in_and_out(machine: Machine) -> None:
    array = np.array([1.0, -0.0, 3.3895314e38, 1e-40], np.float32).astype(ml_dtypes.bfloat16)
    tensor = cuda_graph.to_tensor(array)
    assert tensor.dtype == torch.bfloat16
    back = cuda_graph.to_array(tensor)
    assert back.dtype == ml_dtypes.bfloat16
    assert back.tobytes() == array.tobytes()


def test_rows_that_nobody_timed_take_the_algorithm_of_the_nearest(machine: Machine) -> None:
    """The default one may be among those that crash."""
    layer = SparseLinear(two_four(32, 64), None, {16: 1, 256: 2})
    for rows, gain in ((16, 0.6), (24, 0.6), (8, 0.6), (200, 0.3), (1000, 0.3)):
        machine.gains.clear()
        layer(torch.zeros(rows, 64).half())
        assert machine.gains == [gain], rows


def test_a_compressed_layer_that_was_moved_is_refused(machine: Machine) -> None:
    layer = SparseLinear(two_four(32, 64), None, {})
    layer.packed = layer.packed.clone()
    with pytest.raises(EngineError, match="A compressed layer was moved or copied"):
        layer(torch.zeros(8, 64).half())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_profiler_that_sees_no_kernel_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(EngineError, match="The PyTorch profiler saw no GPU kernel"):
        kernels.kernels_by_layer(lambda: torch.zeros(4).sum())


def test_sparse_kernels_are_known_by_name() -> None:
    names = ("sm90_xmma_sparse_gemm_f16f16_f16f32", "nvjet_hsh_128x256", "cutlass_spmma", DENSE)
    assert kernels.sparse_kernels(names) == (names[0], names[2])
