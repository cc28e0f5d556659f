"""Every kind of layer as a matrix: Linear, Conv1D and Conv2d."""

from pathlib import Path

import pytest
import torch
from model_cases import CPU, LLAMA, silent
from opened import open_tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import BlockCall, shared_inputs
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.layers import (
    Layer,
    from_matrix,
    input_rows,
    is_layer,
    layer_at,
    matrix_shape,
    obstacle,
    reduction_axis,
    to_matrix,
)
from prox24_deploy.pruning.prune import PrunedState, prune_model
from prox24_deploy.sparsity.pattern import is_24, project_24

CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": 2, "padding": (2, 1)},
    {"kernel_size": 3, "dilation": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


def conv1d(features: int, outputs: int) -> Conv1D:
    layer = Conv1D(outputs, features)
    nn.init.normal_(layer.bias)
    return layer


def draw_layers() -> list[tuple[Layer, Tensor]]:
    torch.manual_seed(0)
    images = torch.randn(2, 8, 7, 9)
    return [
        (nn.Linear(8, 6), torch.randn(2, 5, 8)),
        (conv1d(8, 6), torch.randn(2, 5, 8)),
        *((nn.Conv2d(8, 6, **kind), images) for kind in CONVOLUTIONS),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("index", range(2 + len(CONVOLUTIONS)))
@torch.no_grad()
def test_rows_times_matrix_is_what_the_layer_computes(index: int) -> None:
    layer, tensor = draw_layers()[index]
    assert layer.bias is not None
    product = input_rows(layer, tensor) @ to_matrix(layer, layer.weight).T + layer.bias
    output = layer(tensor)
    if isinstance(layer, nn.Conv2d):
        output = output.flatten(2).transpose(1, 2)
    torch.testing.assert_close(product, output)


@pytest.mark.parametrize("index", range(2 + len(CONVOLUTIONS)))
@torch.no_grad()
def test_a_24_matrix_is_24_along_the_axis_of_the_stored_weight(index: int) -> None:
    layer, _ = draw_layers()[index]
    matrix = to_matrix(layer, layer.weight)
    assert torch.equal(from_matrix(layer, matrix), layer.weight)
    stored = from_matrix(layer, project_24(matrix))
    assert stored.is_contiguous()
    assert stored.shape == layer.weight.shape
    assert is_24(stored, reduction_axis(layer))
    assert matrix_shape(layer) == matrix.shape


def test_a_convolution_groups_over_channels_and_not_over_places() -> None:
    """Two of four channels at every place: 2:4 over channels, dense over flattened places."""
    layer = nn.Conv2d(4, 2, 3)
    weight = torch.ones(2, 4, 3, 3)
    weight[:, 2:] = 0
    assert is_24(to_matrix(layer, weight))
    assert not is_24(weight.flatten(1))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(6, 4), "in_features 6 is not a multiple of 4"),
        (conv1d(10, 4), "in_features 10 is not a multiple of 4"),
        (nn.Conv2d(3, 4, 3), "in_channels 3 is not a multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=8), "its convolution runs in 8 groups of channels"),
        (nn.Conv2d(8, 8, 3), ""),
        (conv1d(4, 9), ""),
    ],
)
def test_what_cannot_be_pruned_says_why(layer: Layer, reason: str) -> None:
    assert obstacle(layer) == reason


def test_a_subclass_that_computes_something_else_is_not_a_layer() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    assert not is_layer(Scaled(4, 4))
    assert is_layer(Renamed(4, 4))
    assert not is_layer(nn.ConvTranspose2d(4, 4, 2))


class Residual(nn.Module):
    """Two convolutions of one image with different kernels, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.wide_too = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.wide(hidden) + self.wide_too(hidden) + self.narrow(hidden)
        return torch.as_tensor(hidden + torch.relu(self.depthwise(mixed)))


class Images(nn.Module):
    """A stem and two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList([Residual(), Residual()])

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.stem(pixel_values)
        for block in self.blocks:
            hidden = block(hidden)
        return torch.as_tensor(hidden)


IMAGES = LLAMA.model_copy(
    update={"task": "feature-extraction", "blocks": "blocks", "targets": ["wide*", "narrow", "de*"]}
)


def image_batches(count: int, seed: int) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        Batch(
            {"pixel_values": torch.randn(4, 3, 6, 6, generator=generator)},
            torch.ones(4, dtype=torch.bool),
        )
        for _ in range(count)
    )


def prune_images(model: nn.Module, folder: Path, options: PruneOptions) -> PrunedState:
    return prune_model(
        model,
        IMAGES,
        image_batches(8, 0),
        image_batches(2, 1),
        options,
        stored_dtype=lambda _: torch.float32,
        store=BlockStore(folder),
        progress=silent,
    )


def test_convolutions_of_one_image_share_a_problem_only_with_the_same_kernel() -> None:
    block = Residual()
    layers: dict[str, Layer] = {n: layer_at(block, n) for n in ("wide", "wide_too", "narrow")}
    groups = shared_inputs(block, layers, BlockCall((), {}), torch.randn(1, 8, 5, 5))
    assert groups == [["wide", "wide_too"], ["narrow"]]


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_convolutional_model_is_pruned_over_input_channels(
    tmp_path: Path, *, reconstruct: bool
) -> None:
    model = Images().eval().requires_grad_(requires_grad=False).to(CPU)
    options = PruneOptions(preset="fast", reconstruct=reconstruct)
    state = prune_images(model, tmp_path, options)
    records: dict[str, LayerRecord] = {record.name: record for record in state.layers}
    assert records["blocks.1.depthwise"].reason == "its convolution runs in 8 groups of channels"
    assert records["stem"].reason == "not a target of recipe llama"
    assert records["blocks.0.wide"].shape == (8, 72)
    assert state.axes.keys() == state.weights.keys()
    for name, weight in state.weights.items():
        assert is_24(weight, state.axes[name])
        error = records[name.removesuffix(".weight")].held_out_error
        assert error is not None
        assert 0 < error < 0.5


def test_a_conv1d_is_pruned_like_the_linear_layer_of_the_same_weights(tmp_path: Path) -> None:
    """The whole model must come out the same but for the layout of the stored weight."""

    class Plain(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.as_tensor(hidden + self.layer(hidden))

    class Decoder(nn.Module):
        def __init__(self, *, transposed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            linear = nn.Linear(8, 8)
            layer: nn.Module = linear
            if transposed:
                layer = conv1d(8, 8)
                layer.weight, layer.bias = nn.Parameter(linear.weight.T.clone()), linear.bias
            self.layers = nn.ModuleList([Plain(layer)])

        def forward(self, hidden: Tensor, *, use_cache: bool) -> Tensor:
            return torch.as_tensor(self.layers[0](hidden))

    recipe = LLAMA.model_copy(update={"blocks": "layers", "targets": ["layer"]})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 20, 8, generator=generator)
    batches = (Batch({"hidden": hidden}, torch.ones(6, 20, dtype=torch.bool)),)
    weights = [
        prune_model(
            Decoder(transposed=transposed).eval().requires_grad_(requires_grad=False),
            recipe, batches, (), PruneOptions(),
            stored_dtype=lambda _: torch.float32,
            store=BlockStore(tmp_path / str(transposed)),
            progress=silent,
        ).weights["layers.0.layer.weight"]
        for transposed in (False, True)
    ]  # fmt: skip
    assert torch.equal(weights[0], weights[1].T)
    assert is_24(weights[0], 1)


def test_a_fused_projection_is_pruned_like_its_three_parts(
    tiny_gpt2: Path, prose: Path, tmp_path: Path
) -> None:
    """Rows are independent: queries, keys and values of c_attn do not see each other."""
    opened = open_tiny(tiny_gpt2, prose)
    state = prune_model(
        opened.model, opened.recipe, opened.batches[1:], opened.batches[:1], PruneOptions(),
        stored_dtype=lambda _: torch.float32, store=BlockStore(tmp_path), progress=silent,
    )  # fmt: skip
    assert len(state.weights) == 8
    fused = state.weights["transformer.h.0.attn.c_attn.weight"]
    assert fused.shape == (32, 96)
    assert is_24(fused, 0)
    assert not is_24(fused, 1)
    assert set(state.axes.values()) == {0}
