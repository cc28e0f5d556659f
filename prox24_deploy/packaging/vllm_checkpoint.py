"""The pruned checkpoint of a bundle with the quantised weights in their places, as vLLM reads it.

vLLM and compressed-tensors want `LAYER.weight_scale` as (out, 1) and `LAYER.input_scale` as (1,),
beside `LAYER.weight` in eight bits; both are float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prox24_deploy.bundle.layout import QUANTIZED_TENSORS, shipped_folder
from prox24_deploy.bundle.manifest import FileEntry, Manifest
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.quantized import QuantizeResult
from prox24_deploy.core.tensor_names import names_like
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.graph.check.tensor_files import TensorEntry, TensorFile, open_tensor_file
from prox24_deploy.packaging.source import entry_of, read_record
from prox24_deploy.packaging.tensor_copy import Copied
from prox24_deploy.packaging.vllm_reading import Joined

_STAGE = "quantize"
_WEIGHT, _SCALE, _INPUT = ".weight", ".weight_scale", ".input_scale"
_OUTPUT = ".output_scale"
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is written of a bundle.

    Attributes:
        shards: weight files of the pruned checkpoint.
        format: of the quantised layers; None where there are none.
        replaced: tensors of other values, by their name in the checkpoint.
        added: scales, by the name of the weight that they are of.
        kept: layers that quantisation left in 16 bits, by module path.
        sources: every weight file, and what its content must be.
    """

    shards: tuple[TensorFile, ...]
    format: QuantizedFormat | None = None
    replaced: Mapping[str, Copied] = field(default_factory=dict)
    added: Mapping[str, tuple[Copied, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    sources: tuple[tuple[Path, FileEntry], ...] = ()

    @property
    def layers(self) -> frozenset[str]:
        """Layers that are quantised."""
        return frozenset(name.removesuffix(_WEIGHT) for name in self.added)

    @property
    def sparse(self) -> frozenset[str]:
        """Layers that are 2:4, of a quantised model those that are quantised too."""
        found = {name for shard in self.shards for name in shard.sparse_axes or ()}
        layers = frozenset(name.removesuffix(_WEIGHT) for name in found)
        return layers if self.format is None else layers & self.layers

    @property
    def ignored(self) -> tuple[str, ...]:
        """Modules with a matrix that is not quantised; the head may have none of its own."""
        matrices = {
            entry.name.removesuffix(_WEIGHT)
            for shard in self.shards
            for entry in shard.tensors
            if entry.name.endswith(_WEIGHT) and len(entry.shape) == 2
        }
        return tuple(sorted({*matrices, _HEAD} - self.layers))

    def tensors_of(self, shard: TensorFile) -> list[Copied]:
        """All that is written into one weight file."""
        tensors: list[Copied] = []
        for entry in shard.tensors:
            plain = Copied(name=entry.name, file=shard, entry=entry, shape=entry.shape)
            tensors.append(self.replaced.get(entry.name, plain))
            tensors.extend(self.added.get(entry.name, ()))
        return tensors

    def require_uniform(self, joined: Sequence[Joined]) -> None:
        """Refuse layers that vLLM fuses and of which not all are quantised, and by one input scale.

        It takes the largest of their scales (FP8), or the last (INT8), which would be another model
        than the one that was measured.

        Raises:
            BundleError: names the first such layer.
        """
        for layer in joined:
            if not layer.is_within(self.layers):
                kept = next(part for part in layer.parts if part not in self.layers)
                raise BundleError(
                    f"vLLM joins {', '.join(layer.parts)} and wants one format for all, but {kept} "
                    "was left in 16 bits; build the bundle without --quantize."
                )
            scales = {part: self._input_scale(part) for part in layer.parts}
            if len(set(scales.values())) > 1:
                raise BundleError(
                    f"vLLM joins {', '.join(layer.parts)} and takes one input scale for all, but "
                    f"they have {sorted(set(scales.values()))}; build the bundle without "
                    "--quantize."
                )

    def _input_scale(self, layer: str) -> float:
        (copied,) = (c for c in self.added[layer + _WEIGHT] if c.name.endswith(_INPUT))
        return float(copied.file.read(copied.entry))


def open_checkpoint(bundle: Path, manifest: Manifest) -> Checkpoint:
    """Read the headers of the weight files of a bundle that verifies.

    Raises:
        BundleError: a quantised tensor is of none in the checkpoint, or the record is damaged.
    """
    folder = shipped_folder(manifest.files)
    names = [name for name in manifest.files if _is_shard(name, folder)]
    sources = tuple(entry_of(bundle, manifest, name) for name in names)
    shards = tuple(open_tensor_file(path) for path, _ in sources)
    if QUANTIZED_TENSORS not in manifest.files:
        return Checkpoint(shards=shards, sources=sources)
    numbers, expected = entry_of(bundle, manifest, QUANTIZED_TENSORS)
    record = read_record(bundle, _STAGE, QuantizeResult)
    replaced, added = _placed(open_tensor_file(numbers), shards)
    return Checkpoint(
        shards=shards,
        format=record.format,
        replaced=replaced,
        added=added,
        kept=tuple(layer.name for layer in record.layers if layer.reason),
        sources=(*sources, (numbers, expected)),
    )


def _is_shard(name: str, folder: str) -> bool:
    path = Path(name)
    return path.parent == Path(folder) and path.suffix == ".safetensors"


def _placed(
    numbers: TensorFile, shards: Sequence[TensorFile]
) -> tuple[dict[str, Copied], dict[str, tuple[Copied, ...]]]:
    """Quantised tensors by the name of what they replace, and scales by that of their weight."""
    stored = {entry.name: entry for shard in shards for entry in shard.tensors}
    given = {entry.name: entry for entry in numbers.tensors}
    replaced: dict[str, Copied] = {}
    added: dict[str, tuple[Copied, ...]] = {}
    for name, entry in given.items():
        # vLLM rounds no outputs.
        if name.endswith((_SCALE, _INPUT, _OUTPUT)):
            continue
        place = _place(name, entry, stored)
        replaced[place] = Copied(name=place, file=numbers, entry=entry, shape=entry.shape)
        scale = given.get(name.removesuffix(_WEIGHT) + _SCALE)
        if scale is not None:
            layer, given_layer = place.removesuffix(_WEIGHT), name.removesuffix(_WEIGHT)
            limit = given[given_layer + _INPUT]
            added[place] = (
                Copied(name=layer + _SCALE, file=numbers, entry=scale, shape=(scale.size, 1)),
                Copied(name=layer + _INPUT, file=numbers, entry=limit, shape=(1,)),
            )
    return replaced, added


def _place(name: str, entry: TensorEntry, stored: Mapping[str, TensorEntry]) -> str:
    found = names_like(name, stored)
    if len(found) != 1:
        raise BundleError(
            f"Quantised tensor {name} matches {len(found)} tensors of the checkpoint, expected "
            "one; it has names of its own, which are not written for vLLM."
        )
    if stored[found[0]].shape != entry.shape:
        raise BundleError(
            f"Quantised tensor {name} is {entry.shape}, but {stored[found[0]].shape} in the "
            "checkpoint; build the bundle again."
        )
    return found[0]
