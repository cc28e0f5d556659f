"""A model directory that vLLM loads: the pruned checkpoint, with the quantised weights if any.

Of a bundle that is not quantised it is the checkpoint in 16 bits; of one that is, the tensors and
the configuration of compressed-tensors. Zeros are stored as they are, weight files say which of
their weights are 2:4, and every such weight is proven on what was written. docs/vllm.md says what
of it runs sparse, in which version.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prox24_deploy.bundle.layout import QUANTIZED_TENSORS, RECIPES, shipped_folder
from prox24_deploy.bundle.manifest import FileEntry, Manifest, hash_file
from prox24_deploy.core.atomic import (
    appearing,
    copy_file,
    make_folder,
    require_absent,
    write_atomic,
)
from prox24_deploy.core.documents import Document, read_object
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.graph.check.check import check_path, require_24
from prox24_deploy.packaging.source import entry_of, require_outside
from prox24_deploy.packaging.tensor_copy import write_copies
from prox24_deploy.packaging.vllm_checkpoint import Checkpoint, open_checkpoint
from prox24_deploy.packaging.vllm_reading import (
    DECODERS,
    FIRST_WITHOUT,
    LAST_SPARSE,
    Decoder,
    Joined,
    joined,
    quantization_config,
    torchao_config,
)
from prox24_deploy.sparsity.declaration import SPARSE_KEY

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
# Ours, which vLLM does not look for: where the directory comes from, and a configuration of torchao
# that the user may name to it.
ORIGIN_FILE = "prox24.json"
TORCHAO_FILE = "torchao.json"

_TASK = "text-generation"
_BITS: dict[QuantizedFormat, str] = {"fp8": "FP8", "int8": "INT8"}


def vllm_directory(
    bundle: Path, manifest: Manifest, out: Path, *, sparse: bool
) -> tuple[Path, tuple[str, ...]]:
    """Write OUT from a bundle that `open_finished` gave; it appears at once.

    Args:
        bundle: OUT of a build.
        manifest: of the bundle.
        out: the model directory, which must not be there.
        sparse: declare 2:4 as vLLM up to `LAST_SPARSE` reads it, which later versions refuse.

    Returns:
        OUT, and sentences that whoever serves it must know.

    Raises:
        BundleError: the model cannot be served by vLLM, or a file changed while it was copied.
        UsageError: OUT is there, or lies in the bundle.
        SparsityLostError: a weight that was written is not 2:4.
    """
    require_outside(bundle, out)
    require_absent(out)
    writer = _Writer(bundle, manifest, sparse=sparse)
    with appearing(out) as partial:
        make_folder(partial)
        writer.write(partial)
        require_24(check_path(partial))
    return out, tuple(writer.notes(out))


def decoder_of(manifest: Manifest, *, more: bool) -> Decoder:
    """What vLLM has for the model of a bundle.

    Args:
        manifest: of the bundle.
        more: whether more than the checkpoint in 16 bits is to be written.

    Raises:
        BundleError: it has nothing for it, or nothing that is known here.
    """
    model = manifest.model
    if model is None:
        raise BundleError("The manifest names no model; build the bundle again.")
    if model.task != _TASK:
        raise BundleError(
            f"Model {model.title} is for {model.task}, and only decoders ({_TASK}) are written for "
            "vLLM; pass --triton OUT for others."
        )
    decoder = DECODERS.get(model.architecture)
    if decoder is None:
        raise BundleError(
            f"Model {model.title} is a {model.architecture}, which has not been compared with "
            f"vLLM's sources, unlike {', '.join(sorted(DECODERS))}; serve it from "
            f"{shipped_folder(manifest.files)}/ at your own risk."
        )
    if more and decoder.only_16_bit:
        raise BundleError(
            f"Of {model.architecture} only a 16-bit checkpoint is written for vLLM, because "
            f"{decoder.only_16_bit}; build without --quantize, and leave out --vllm-sparse."
        )
    return decoder


class _Writer:
    """Writes the directory of one bundle."""

    def __init__(self, bundle: Path, manifest: Manifest, *, sparse: bool) -> None:
        self._bundle, self._manifest, self._sparse = bundle, manifest, sparse
        self._folder = shipped_folder(manifest.files)
        self._decoder = decoder_of(manifest, more=sparse or QUANTIZED_TENSORS in manifest.files)
        self._checkpoint: Checkpoint = open_checkpoint(bundle, manifest)
        self._checkpoint.require_uniform(joined(self._checkpoint.layers, self._decoder))
        if sparse and not self._kernels():
            raise BundleError(
                "No layer of the model can be declared as 2:4 for vLLM: of each that it fuses or "
                "runs, some part is dense; leave out --vllm-sparse."
            )

    def write(self, folder: Path) -> None:
        """Write every file."""
        for name, (source, expected) in self._companions():
            make_folder((folder / name).parent)
            _copy(source, expected, folder / name)
        if self._checkpoint.format is None:
            self._copy_weights(folder)
        else:
            self._write_weights(folder)
        self._write_config(folder)
        _write_json(folder / ORIGIN_FILE, self._origin())
        if modules := self._torchao_modules():
            _write_json(folder / TORCHAO_FILE, torchao_config(modules))

    def notes(self, out: Path) -> Iterator[str]:
        """What whoever serves the directory must know."""
        known = self._checkpoint.format
        what = _BITS[known] if known else "16 bits"
        if self._sparse:
            yield (
                f"vLLM {LAST_SPARSE} has kernels for 2:4 weights in {what}, on compute capability "
                f"9.0; vLLM {FIRST_WITHOUT} and later refuse this directory. Not tried."
            )
        else:
            yield (
                f"vLLM {FIRST_WITHOUT} and later run the 2:4 weights in {what} as dense ones. "
                "Not tried."
            )
        if dense := self._left_dense():
            yield f"Dense in part, so declared in none: {', '.join(dense)}."
        if kept := self._checkpoint.kept:
            yield f"Not quantised: {', '.join(kept)}."
        if self._torchao_modules():
            overrides = json.dumps({"quantization_config_file": str(out / TORCHAO_FILE)})
            yield (
                "FP8 with 2:4 by torchao 0.18.0, on compute capability 9.0, with ranges of its own "
                f"that no figure of the report is of: --quantization torchao --hf-overrides "
                f"'{overrides}'. Not tried in vLLM."
            )

    def _candidates(self) -> tuple[Joined, ...]:
        """Layers of vLLM that are 2:4 in part or as a whole, of those it is to run so."""
        return joined(self._checkpoint.sparse, self._decoder)

    def _kernels(self) -> list[str]:
        """Layers of the checkpoint whose kernels for 2:4 vLLM can be told to use."""
        whole = (each for each in self._candidates() if each.is_within(self._checkpoint.sparse))
        return sorted(part for each in whole for part in each.parts)

    def _left_dense(self) -> list[str]:
        if not (self._sparse or self._torchao_modules()):
            return []
        sparse = self._checkpoint.sparse
        return [each.name for each in self._candidates() if not each.is_within(sparse)]

    def _torchao_modules(self) -> list[str]:
        """Layers of vLLM that torchao can be told to run as FP8 with 2:4."""
        if self._sparse or self._checkpoint.format is not None or self._decoder.only_16_bit:
            return []
        sparse = self._checkpoint.sparse
        return [each.name for each in self._candidates() if each.is_within(sparse)]

    def _companions(self) -> Iterator[tuple[str, tuple[Path, FileEntry]]]:
        """Files that are copied as they are."""
        written = {CONFIG_FILE, INDEX_FILE, *(f.path.name for f in self._checkpoint.shards)}
        for name in self._manifest.files:
            inner = name.removeprefix(f"{self._folder}/")
            if inner not in {name, *written} and name not in RECIPES:
                yield inner, entry_of(self._bundle, self._manifest, name)

    def _copy_weights(self, folder: Path) -> None:
        index = [INDEX_FILE] if f"{self._folder}/{INDEX_FILE}" in self._manifest.files else []
        for name in (*(file.path.name for file in self._checkpoint.shards), *index):
            source, expected = entry_of(self._bundle, self._manifest, f"{self._folder}/{name}")
            _copy(source, expected, folder / name)

    def _write_weights(self, folder: Path) -> None:
        total = 0
        places: dict[str, str] = {}
        for shard in self._checkpoint.shards:
            tensors = self._checkpoint.tensors_of(shard)
            metadata = {"format": "pt"}
            if shard.sparse_axes is not None:
                metadata[SPARSE_KEY] = json.dumps(shard.sparse_axes)
            total += write_copies(tensors, metadata, folder / shard.path.name)
            places |= {tensor.name: shard.path.name for tensor in tensors}
        for source, expected in self._checkpoint.sources:
            _require_same(source, expected)
        if f"{self._folder}/{INDEX_FILE}" in self._manifest.files:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            _write_json(folder / INDEX_FILE, index)

    def _write_config(self, folder: Path) -> None:
        source, expected = entry_of(self._bundle, self._manifest, f"{self._folder}/{CONFIG_FILE}")
        known = self._checkpoint.format
        if known is None and not self._sparse:
            _copy(source, expected, folder / CONFIG_FILE)
            return
        document = Document(str(source), BundleError, "build the bundle again")
        config = read_object(source, document, finite=False)
        _require_same(source, expected)
        ignored = self._checkpoint.ignored if known else ()
        sparse = self._kernels() if self._sparse else ()
        config["quantization_config"] = quantization_config(known, ignored, sparse)
        _write_json(folder / CONFIG_FILE, config)

    def _origin(self) -> dict[str, Any]:
        return {
            "written_by": f"prox24-deploy {self._manifest.tool_version}",
            "verdict": self._manifest.verdict,
            "manifest_sha256": self._manifest.self_sha256,
            "format": self._checkpoint.format or "16-bit",
            "sparse_layers": sorted(self._checkpoint.sparse),
        }


def _copy(source: Path, expected: FileEntry, target: Path) -> None:
    copy_file(source, target)
    _require_same(source, expected, target)


def _require_same(source: Path, expected: FileEntry, copy: Path | None = None) -> None:
    if hash_file(copy or source) != expected:
        raise BundleError(f"File {source} changed while it was read; verify the bundle.")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
