"""What the builder says of sparse layers, in every wording that is documented.

The logs have the shapes of those in public reports, of which `REPORTS` says where, and of the
strings in TensorRT's developer guide, with names of layers made up; none was recorded here.
"""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prox24_deploy.core.records import BuilderSparsity, Kernel, LayerEvidence, TensorCheck
from prox24_deploy.engines.tensorrt.evidence import (
    engine_evidence,
    is_sparse_kernel,
    parse_builder,
    parse_layers,
)

I = "[03/23/2021-00:14:05] [I] [TRT] "  # noqa: E741 - as the log abbreviates it
FOUND, CHOSE = "layer(s) eligible to use sparse tactics", "layer(s) using sparse tactics"
OLD_FOUND = "(Sparsity) Layers eligible for sparse math:"
OLD_CHOSE = "(Sparsity) TRT inference plan picked sparse implementation for layers:"

# Issues of github.com/NVIDIA/TensorRT where no other is named.
REPORTS: dict[str, tuple[str, BuilderSparsity]] = {
    "trtexec's prefix, lines of Windows padded to the width of a terminal: 1403, 2271": (
        f"{I}{OLD_FOUND} Conv_0, Conv_5     \r\n{I}{OLD_CHOSE}                  \r\n{I}Done\r\n",
        BuilderSparsity(eligible=2, chosen=0, eligible_layers=("Conv_0", "Conv_5")),
    ),
    "the prefix of the Python bindings: pytorch/TensorRT 1340": (
        f"[TensorRT] INFO: {OLD_FOUND} Gemm_3\n[TensorRT] INFO: {OLD_CHOSE} Gemm_3\n",
        BuilderSparsity(
            eligible=1, chosen=1, eligible_layers=("Gemm_3",), chosen_layers=("Gemm_3",)
        ),
    ),
    "no prefix and no names, twice, of which the last counts: Model-Optimizer 1664": (
        f"(Sparsity) Found 39 {FOUND}\n(Sparsity) Chose 0 {CHOSE}\n"
        f"(Sparsity) Found 196 {FOUND}\n(Sparsity) Chose 140 {CHOSE}\n",
        BuilderSparsity(eligible=196, chosen=140),
    ),
    "fused names, with commas in brackets: 4056": (
        f"{I}(Sparsity) Found 3 {FOUND}: /a/Conv + PWN(PWN(/a/Sigmoid), /a/Mul), Conv_3 + Relu_4, "
        f"c\n{I}(Sparsity) Chose 1 {CHOSE}: /a/Conv + PWN(PWN(/a/Sigmoid), /a/Mul)\n",
        BuilderSparsity(
            eligible=3,
            chosen=1,
            eligible_layers=(
                "/a/Conv + PWN(PWN(/a/Sigmoid), /a/Mul)", "Conv_3 + Relu_4", "c",
            ),
            chosen_layers=("/a/Conv + PWN(PWN(/a/Sigmoid), /a/Mul)",),
        ),
    ),
    "wrapped within a name where it was pasted, so that the list is torn: 2169": (
        f"{I}(Sparsity) Found 3 {FOUND}: Conv_1, Conv_25 + Re\nlu_26, Conv_30\n"
        f"{I}(Sparsity) Chose 0 {CHOSE}\n",
        BuilderSparsity(eligible=3, chosen=0, eligible_layers=("Conv_1", "Conv_25 + Re")),
    ),
    "through Polygraphy, another thread's line within the names": (
        f"[V] (Sparsity) Found 3 {FOUND}: a, b[X] Tactic: 0x1\n\n[V] (Sparsity) Chose 1 "
        f"{CHOSE}: a\n",
        BuilderSparsity(eligible=3, chosen=1, eligible_layers=("a", "b"), chosen_layers=("a",)),
    ),
}  # fmt: skip
LOGS: dict[str, tuple[str, BuilderSparsity]] = {
    **REPORTS,
    "developer guide until 2024": (
        f"{I}{OLD_FOUND} conv1, conv2, conv3\n{I}{OLD_CHOSE} conv2, conv3\n",
        BuilderSparsity(
            eligible=3,
            chosen=2,
            eligible_layers=("conv1", "conv2", "conv3"),
            chosen_layers=("conv2", "conv3"),
        ),
    ),
    "older, fused layers": (
        f"{I}{OLD_FOUND} MatMul_401, Conv_619 + Relu_620\n{I}{OLD_CHOSE} Conv_619 + Relu_620\n",
        BuilderSparsity(
            eligible=2,
            chosen=1,
            eligible_layers=("MatMul_401", "Conv_619 + Relu_620"),
            chosen_layers=("Conv_619 + Relu_620",),
        ),
    ),
    "older, none chosen": (
        f"{I}{OLD_FOUND} Conv_22, Gemm_725\n{I}{OLD_CHOSE}\n{I}next\n",
        BuilderSparsity(eligible=2, chosen=0, eligible_layers=("Conv_22", "Gemm_725")),
    ),
    "today, with names": (
        f"{I}(Sparsity) Found 2 {FOUND}: node_a, node_b\n{I}(Sparsity) Chose 1 {CHOSE}: node_b\n",
        BuilderSparsity(
            eligible=2, chosen=1, eligible_layers=("node_a", "node_b"), chosen_layers=("node_b",)
        ),
    ),
    "today, lines of Windows": (
        f"{I}(Sparsity) Found 1 {FOUND}: a\r\n{I}(Sparsity) Chose 1 {CHOSE}: a\r\n",
        BuilderSparsity(eligible=1, chosen=1, eligible_layers=("a",), chosen_layers=("a",)),
    ),
    "today, without names": (
        f"(Sparsity) Found 39 {FOUND}\n(Sparsity) Chose 0 {CHOSE}\n",
        BuilderSparsity(eligible=39, chosen=0),
    ),
    "today, zero with a colon": (
        f"{I}(Sparsity) Found 0 {FOUND}: \n{I}(Sparsity) Chose 0 {CHOSE}: \n",
        BuilderSparsity(eligible=0, chosen=0),
    ),
    "the last pair counts": (
        f"{I}(Sparsity) Found 3 {FOUND}: a, b, c\n{I}(Sparsity) Chose 3 {CHOSE}: a, b, c\n"
        f"{I}(Sparsity) Found 2 {FOUND}: a, b\n{I}(Sparsity) Chose 0 {CHOSE}\n",
        BuilderSparsity(eligible=2, chosen=0, eligible_layers=("a", "b")),
    ),
    "cut off within the names": (
        f"{I}(Sparsity) Found 3 {FOUND}: a, b",
        BuilderSparsity(eligible=3, chosen=None, eligible_layers=("a", "b")),
    ),
    "older, cut off within the names: their number is not known": (
        f"{I}{OLD_FOUND} a, b, node_lin",
        BuilderSparsity(eligible=None, chosen=None, eligible_layers=("a", "b", "node_lin")),
    ),
    "cut off within the sentence": (
        f"{I}(Sparsity) Found 3 {FOUND}: a, b, c\n{I}(Sparsity) Chose 2 layer(s) us",
        BuilderSparsity(eligible=3, chosen=None, eligible_layers=("a", "b", "c")),
    ),
    "cut off after the first line of a second pass": (
        f"{I}(Sparsity) Found 3 {FOUND}\n{I}(Sparsity) Chose 3 {CHOSE}\n"
        f"{I}(Sparsity) Found 2 {FOUND}\n",
        BuilderSparsity(eligible=2, chosen=None),
    ),
    "begins after the first line": (
        f"{FOUND}: a\n{I}(Sparsity) Chose 1 {CHOSE}: a\n",
        BuilderSparsity(eligible=None, chosen=1, eligible_layers=(), chosen_layers=("a",)),
    ),
    "another thread's line within the names": (
        f"{I}(Sparsity) Found 3 {FOUND}: a, b[03/23/2021-00:14:05] [V] [TRT] Tactic: 0x1\n, c\n"
        f"{I}(Sparsity) Chose 1 {CHOSE}: a\n",
        BuilderSparsity(eligible=3, chosen=1, eligible_layers=("a", "b"), chosen_layers=("a",)),
    ),
    "older, another thread's line within the names": (
        f"{I}{OLD_FOUND} a, b{I}{OLD_CHOSE} a\n",
        BuilderSparsity(eligible=None, chosen=1, eligible_layers=("a", "b"), chosen_layers=("a",)),
    ),
    "both lines in one": (
        f"(Sparsity) Found 1 {FOUND}: a(Sparsity) Chose 1 {CHOSE}: a\n",
        BuilderSparsity(eligible=1, chosen=1, eligible_layers=("a",), chosen_layers=("a",)),
    ),
    "another thread's line within the sentence": (
        f"{I}(Sparsity) Found 3 layer(s) elig{I}hello\nible to use sparse tactics: a\n",
        BuilderSparsity(eligible=None, chosen=None),
    ),
    "nothing on sparsity, as of TensorRT-RTX": (
        f"{I}Engine generation completed in 0.02 seconds.\n",
        BuilderSparsity(eligible=None, chosen=None),
    ),
    "other messages on sparsity": (
        f"{I}(Sparsity) Please provide sparse weights if you want to refit sparse layers\n",
        BuilderSparsity(eligible=None, chosen=None),
    ),
    "empty": ("", BuilderSparsity(eligible=None, chosen=None)),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_log_is_read_in_every_wording(name: str) -> None:
    log, expected = LOGS[name]
    assert parse_builder(log) == expected


@given(st.text(), st.text())
@example("[" * 100_000, "[" * 100_000)
@example(f"(Sparsity) Found {'9' * 5000} {FOUND}", '{"Layers": ' + "9" * 5000 + "}")
def test_no_text_makes_the_parser_raise(log: str, layers: str) -> None:
    parse_builder(log, layers)


@given(st.lists(st.sampled_from([
    "(Sparsity) ", "Found ", "Chose ", "2 ", FOUND, CHOSE, OLD_FOUND, OLD_CHOSE, ": ", "a, b", "\n",
    I, "[TRT]",
]), max_size=20).map("".join))  # fmt: skip
def test_no_shuffled_log_makes_the_parser_raise_or_invent(log: str) -> None:
    said = parse_builder(log)
    assert said.eligible is None or said.eligible in {2} | set(range(20))
    assert all(name and name in log for name in said.eligible_layers + said.chosen_layers)


@pytest.mark.parametrize("names", [("Bindings", "x"), ("I/O Tensors", {"Name": "x"})])
def test_the_inspectors_of_both_versions_are_read(names: tuple[str, object]) -> None:
    """10 lists bindings by name, 11 I/O tensors as objects and splits format from type."""
    layers = [
        {"Name": "node_a", "LayerType": "gemm", "TacticName": "sm80_xmma_sparse_gemm_f16"},
        {"Name": "b", "Metadata": "[ONNX Layer: node_b]", "HasSparseWeights": 1, "TacticName": "t"},
        {"Name": "c", "TacticName": None},
        "a layer by name alone",
    ]
    assert parse_layers(json.dumps({"Layers": layers, names[0]: [names[1]]})) == (
        Kernel(layer="node_a", nodes="", tactic="sm80_xmma_sparse_gemm_f16"),
        Kernel(layer="b", nodes="[ONNX Layer: node_b]", tactic="t"),
        Kernel(layer="c", nodes="", tactic=""),
    )


def test_an_inspector_file_as_published_is_read() -> None:
    """In the shape of those of trt-engine-explorer (TensorRT 8 and 10), names of layers made up.

    A reformat and a depthwise convolution have no name of a kernel; a fused convolution has its
    weight, its Q/DQ nodes and its activation in its own name.
    """
    ends = {"Location": "Device", "Dimensions": [1, 32, 8, 8], "Format/Datatype": "Row major FP16"}
    layers = [
        {
            "Name": "QuantizeLinear_2", "LayerType": "Reformat", "Origin": "QDQ",
            "Inputs": [{"Name": "in", **ends}], "Outputs": [{"Name": "317", **ends}],
            "TacticValue": "0x0000000000000000",
        },
        {
            "Name": "block.0.weight + QuantizeLinear_8 + Conv_12 + PWN(Clip_16)",
            "LayerType": "CaskConvolution", "ParameterType": "Convolution", "Groups": 1,
            "Weights": {"Type": "Int8", "Count": 864}, "HasSparseWeights": 1, "HasBias": 1,
            "TacticName": "sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_sptensor16x8x64",
            "TacticValue": "0x10d7116a3fad9b7a",
            "Metadata": "[ONNX Layer: QuantizeLinear_8]\x1e[ONNX Layer: Conv_12]",
        },
        {
            "Name": "block.1.weight + QuantizeLinear_25 + Conv_29 + PWN(Clip_33)",
            "LayerType": "CudaDepthwiseConvolution", "HasSparseWeights": 0,
            "TacticValue": "0x0000000000000001",
        },
    ]  # fmt: skip
    document = {"Layers": layers, "Bindings": ["in", "out"]}
    found = parse_layers(json.dumps(document))
    assert [(kernel.layer.split(" ")[0], kernel.tactic != "") for kernel in found] == [
        ("QuantizeLinear_2", False), ("block.0.weight", True), ("block.1.weight", False),
    ]  # fmt: skip
    said = BuilderSparsity(eligible=None, chosen=None, kernels=found)
    proof = (check("block.0", "Conv_12"), check("block.1", "Conv_29"))
    layer, depthwise = engine_evidence("tensorrt", "a card", said, proof, "not said").layers
    assert (layer.eligible, layer.chosen) == (True, True)
    assert layer.reason.startswith("kernel sm80_xmma_fprop_sparse_conv")
    assert depthwise.chosen is None


@pytest.mark.parametrize("text", ["", "null", "[]", "7", '{"Layers": 7}', '{"Layers": ["a"]}', "{"])
def test_an_inspector_that_tells_nothing_is_no_layer(text: str) -> None:
    assert parse_layers(text) == ()


@pytest.mark.parametrize(
    ("tactic", "sparse"),
    [
        ("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", True),
        ("sm80_xmma_sparse_conv_fprop_implicit_gemm_interleaved", True),
        ("sm90_xmma_gemm_spmma_f16", True),
        ("ampere_h16816gemm_sptensor", True),
        # Of public reports; the INT8 families have names of their own.
        ("sm80_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwckrsc_sptensor16x8x32_simple", True),
        ("sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_sptensor16x8x64_t1r1s1", True),
        ("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_nt_n_tilesize64x64x64_cusparselt", True),
        ("cutlass_80_tensorop_f16_s16832spgemm_f16_64x128_64x6_tn_align8", True),
        ("cutlass3x_sm90_sptensorop_s64x128x32spgemm_f16_f16_f32_f16_f16_128x128x128", True),
        # `HasSparseWeights` was 1 there: issue 4020.
        ("sm80_xmma_fprop_implicit_gemm_i8f32_i8i32_f32_nhwckrsc_simt", False),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n", False),
        ("__myelin_CASK_STUB", False),
        ("", False),
    ],
)
def test_only_the_kernels_name_tells_a_sparse_one(tactic: str, *, sparse: bool) -> None:
    assert is_sparse_kernel(tactic) is sparse


def check(module: str, node: str, n: int = 512, k: int = 512) -> TensorCheck:
    return TensorCheck(
        tensor=f"{module}.weight_t",
        module=module,
        node=node,
        op_type="MatMul",
        dtype="float16",
        shape=(k, n),
        axis=0,
        density=0.5,
        is_24=True,
        expected=True,
        first_violation=None,
        reason="",
        part="",
        eligible=True,
        ineligible_reason="",
    )


QUERY, KEY = check("layer.query", "node_linear_1"), check("layer.key", "node_linear_12")
SMALL = check("layer.small", "node_linear_2", n=64)
ODD = replace(
    check("layer.odd", "node_linear_3"), eligible=False,
    ineligible_reason="N = 3 is not a multiple of 8",
)  # fmt: skip
FLOAT = replace(
    check("layer.float", "node_linear_4"), dtype="float32", eligible=False,
    ineligible_reason="float32 has no sparse kernels; N = 3 is not a multiple of 8",
)  # fmt: skip
GROUPED = replace(
    ODD, ineligible_reason="TensorRT has no sparse kernels for a convolution of 4 groups"
)
LOST = replace(
    QUERY, is_24=False, eligible=False, reason="3 non-zeros", ineligible_reason="it is not proven"
)
SPARSE_TACTIC = "sm80_xmma_sparse_gemm_f16"


def judged(said: BuilderSparsity | None, *checks: TensorCheck) -> list[tuple[object, ...]]:
    evidence = engine_evidence("tensorrt", "H200", said, checks, "it does not say")
    return [(layer.eligible, layer.chosen, layer.reason) for layer in evidence.layers]


UNNAMED = "unknown: TensorRT does not name the layers that it found eligible"
UNLISTED = "unknown: TensorRT does not list it as eligible and gives no reason"
SLOWER = "timed slower: TensorRT timed sparse kernels and took a dense one"


@pytest.mark.parametrize(
    ("said", "layer", "expected"),
    [
        # Named as chosen, fused into others or not.
        (
            BuilderSparsity(
                eligible=1,
                chosen=1,
                eligible_layers=("node_linear_1",),
                chosen_layers=("node_linear_1",),
            ),
            QUERY,
            (True, True, ""),
        ),
        (
            BuilderSparsity(
                eligible=1,
                chosen=1,
                eligible_layers=("node_linear_1 + node_relu",),
                chosen_layers=("node_linear_1 + node_relu",),
            ),
            QUERY,
            (True, True, ""),
        ),
        (
            BuilderSparsity(
                eligible=1,
                chosen=1,
                eligible_layers=("node_linear_1_myl0_5",),
                chosen_layers=("node_linear_1_myl0_5",),
            ),
            QUERY,
            (True, True, ""),
        ),
        # Found and not taken.
        (
            BuilderSparsity(eligible=1, chosen=0, eligible_layers=("node_linear_1",)),
            QUERY,
            (True, False, SLOWER),
        ),
        (
            BuilderSparsity(eligible=1, chosen=0, eligible_layers=("node_linear_2",)),
            SMALL,
            (True, False, "too small: N = 64, K = 512, and sparse kernels seldom win below 256"),
        ),
        # Not found: by a rule of ours, or for a reason of its own.
        (
            BuilderSparsity(eligible=0, chosen=0),
            ODD,
            (False, False, f"shape rule: {ODD.ineligible_reason}"),
        ),
        (
            BuilderSparsity(eligible=0, chosen=0),
            FLOAT,
            (False, False, f"dtype: {FLOAT.ineligible_reason}"),
        ),
        (
            BuilderSparsity(eligible=0, chosen=0),
            GROUPED,
            (False, False, f"shape rule: {GROUPED.ineligible_reason}"),
        ),
        (BuilderSparsity(eligible=0, chosen=0), LOST, (False, False, "not 2:4: 3 non-zeros")),
        (BuilderSparsity(eligible=0, chosen=0), QUERY, (False, False, UNLISTED)),
        # Its word goes before our rules.
        (
            BuilderSparsity(
                eligible=1,
                chosen=1,
                eligible_layers=("node_linear_3",),
                chosen_layers=("node_linear_3",),
            ),
            ODD,
            (True, True, ""),
        ),
        # Numbers alone.
        (BuilderSparsity(eligible=39, chosen=0), QUERY, (None, False, UNNAMED)),
        (BuilderSparsity(eligible=39, chosen=20), QUERY, (None, None, "unknown: it does not say")),
        (
            BuilderSparsity(eligible=39, chosen=20),
            FLOAT,
            (False, False, f"dtype: {FLOAT.ineligible_reason}"),
        ),
        # An incomplete list, and one with a name that is not in the file, exclude nothing.
        (
            BuilderSparsity(eligible=2, chosen=None, eligible_layers=("a",)),
            QUERY,
            (None, None, "unknown: it does not say"),
        ),
        (
            BuilderSparsity(eligible=1, chosen=None, eligible_layers=("a",)),
            QUERY,
            (None, None, "unknown: it does not say"),
        ),
        # A region is named by its ends and tells nothing of them.
        (
            BuilderSparsity(
                eligible=1, chosen=1, eligible_layers=("{ForeignNode[node_linear_1...y]}",)
            ),
            QUERY,
            (None, None, "unknown: it does not say"),
        ),
        (None, QUERY, (None, None, "unknown: it does not say")),
        (None, FLOAT, (False, False, f"dtype: {FLOAT.ineligible_reason}")),
    ],
)
def test_each_layer_is_eligible_chosen_or_told_why_not(
    said: BuilderSparsity | None, layer: TensorCheck, expected: tuple[object, ...]
) -> None:
    assert judged(said, layer) == [expected]


def test_a_name_that_contains_another_is_another_layer() -> None:
    said = BuilderSparsity(
        eligible=1, chosen=1, eligible_layers=("node_linear_12",), chosen_layers=("node_linear_12",)
    )
    assert judged(said, QUERY, KEY) == [(False, False, UNLISTED), (True, True, "")]


def test_the_inspector_decides_where_the_log_gives_no_names() -> None:
    kernels = (
        Kernel(
            layer="fused",
            nodes="[ONNX Layer: node_linear_1]\x1e[ONNX Layer: node_add]",
            tactic=SPARSE_TACTIC,
        ),
        Kernel(layer="node_linear_12_myl0_7", nodes="", tactic="sm80_xmma_gemm_f16"),
        Kernel(layer="node_linear_2", nodes="", tactic="__myelin_CASK_STUB"),
        Kernel(
            layer="pointwise", nodes="[ONNX Layer: node_linear_2]", tactic="__myl_MulAddTanh_0x1"
        ),
    )
    said = BuilderSparsity(eligible=3, chosen=1, kernels=kernels)
    assert judged(said, QUERY, KEY, SMALL) == [
        (True, True, f"kernel {SPARSE_TACTIC}"),
        (None, False, UNNAMED),
        (None, None, "unknown: it does not say"),
    ]


def test_a_dense_layer_that_the_builder_lists_does_not_spoil_its_list() -> None:
    """A weight that nothing declares may happen to be 2:4; its name is known all the same."""
    said = BuilderSparsity(eligible=1, chosen=0, eligible_layers=("node_linear_12",))
    evidence = engine_evidence("b", "d", said, [QUERY, replace(KEY, expected=False)], "w")
    assert [layer.eligible for layer in evidence.layers] == [False]


def test_weights_that_nothing_declares_are_no_evidence() -> None:
    evidence = engine_evidence("b", "d", None, [replace(QUERY, expected=False), KEY], "w")
    assert evidence.layers == (
        LayerEvidence(module="layer.key", eligible=None, chosen=None, reason="unknown: w"),
    )


def test_the_summary_counts_and_says_what_is_unknown() -> None:
    def summary(said: BuilderSparsity | None) -> tuple[object, ...]:
        made = engine_evidence("b", "d", said, [QUERY], "it is chosen later")
        return made.eligible, made.chosen, made.summary

    told = "the builder found {} layers eligible for sparse kernels and chose {}"
    assert summary(None) == (None, None, "sparse kernels: unknown, it is chosen later")
    assert summary(BuilderSparsity(eligible=3, chosen=2)) == (
        3,
        2,
        told.format(3, "sparse ones for 2"),
    )
    assert summary(BuilderSparsity(eligible=3, chosen=None)) == (
        3, None, told.format(3, "it is unknown for how many"),
    )  # fmt: skip
    kernel = Kernel(layer="a", nodes="", tactic=SPARSE_TACTIC)
    assert summary(BuilderSparsity(eligible=None, chosen=None, kernels=(kernel,))) == (
        None, 1, told.format("an unknown number of", "sparse ones for 1"),
    )  # fmt: skip
    both = BuilderSparsity(eligible=3, chosen=2, kernels=(kernel,))
    assert summary(both)[2] == (
        told.format(3, "sparse ones for 2") + "; the inspector shows 1 sparse kernels"
    )


def test_a_weight_without_a_known_axis_is_judged_too() -> None:
    said = BuilderSparsity(eligible=1, chosen=0, eligible_layers=("node_linear_1",))
    assert judged(said, replace(QUERY, shape=(), axis=-1)) == [(True, False, SLOWER)]
