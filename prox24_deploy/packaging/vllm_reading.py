"""What vLLM reads: the decoders that it has, how it fuses their layers, and configurations.

Read in the released packages of vLLM 0.18.1, 0.19.0 and 0.33.0, torchao 0.18.0 and
compressed-tensors 0.20.1; docs/vllm.md says in which file each fact stands.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prox24_deploy.core.types import QuantizedFormat

# Released versions of which the CUTLASS kernels for 2:4 were the last.
LAST_SPARSE = "0.18.1"
FIRST_WITHOUT = "0.19.0"

_ATTENTION = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_GATED = _ATTENTION | {"gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A class of decoders that vLLM has.

    Attributes:
        fused: name of a layer of vLLM to the layers of the checkpoint that it joins.
        prefixes: how names in a checkpoint begin, to how they begin in vLLM.
        only_16_bit: why no more than the 16-bit checkpoint is handed to it; "" for no reason.
    """

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    only_16_bit: str = ""


# By architecture in config.json; what vLLM's registry.py and the classes that it names say.
DECODERS: dict[str, Decoder] = {
    "GemmaForCausalLM": Decoder(fused=_GATED),
    "GPT2LMHeadModel": Decoder(only_16_bit="compressed-tensors knows Linear layers, not Conv1D"),
    "LlamaForCausalLM": Decoder(fused=_GATED),
    "MistralForCausalLM": Decoder(fused=_GATED),
    "OPTForCausalLM": Decoder(fused=_ATTENTION, prefixes={"decoder.": "model.decoder."}),
    "Phi3ForCausalLM": Decoder(),
    "PhiForCausalLM": Decoder(
        only_16_bit="vLLM 0.33.0 runs it as transformers does, and which layers it fuses then is "
        "not in its sources"
    ),
    "Qwen2ForCausalLM": Decoder(fused=_GATED),
    "Qwen3ForCausalLM": Decoder(fused=_GATED),
}

_TYPES: dict[QuantizedFormat, str] = {"fp8": "float", "int8": "int"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A layer of vLLM, and those of the checkpoint that it is made of.

    `parts` of a layer that is not fused is the layer itself.
    """

    name: str
    parts: tuple[str, ...]

    def is_within(self, layers: frozenset[str]) -> bool:
        """Whether all that it is made of is among these."""
        return layers.issuperset(self.parts)


def joined(layers: Iterable[str], decoder: Decoder) -> tuple[Joined, ...]:
    """The layers of vLLM that some layers of a checkpoint go into, with all their parts."""
    whole = {part: fused for fused, parts in decoder.fused.items() for part in parts}
    found: dict[str, Joined] = {}
    for layer in sorted(layers):
        parent, _, own = layer.rpartition(".")
        into = whole.get(own, own)
        parts = tuple(f"{parent}.{part}" for part in decoder.fused.get(into, (own,)))
        name = _renamed(f"{parent}.{into}", decoder.prefixes)
        found[name] = Joined(name=name, parts=parts)
    return tuple(found.values())


def quantization_config(
    format: QuantizedFormat | None, ignore: Sequence[str], sparse: Sequence[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json, as compressed-tensors has it.

    Args:
        format: of weights, one scale for each output channel, and of inputs, one static scale; None
            for a model of 16 bits.
        ignore: layers of 16 bits.
        sparse: layers that vLLM up to `LAST_SPARSE` is to run with its kernels for 2:4.
    """
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": f"{_TYPES[format]}-quantized" if format else "dense",
        "quantization_status": "compressed" if format else "initialized",
        "config_groups": {"group_0": _group(_TYPES[format])} if format else {},
        "ignore": list(ignore),
    }
    if sparse:
        # Format "dense": zeros are stored, and vLLM compresses when it loads.
        config["sparsity_config"] = {
            "format": "dense",
            "sparsity_structure": "2:4",
            "targets": list(sparse),
            "ignore": [],
        }
    return config


def torchao_config(modules: Sequence[str]) -> dict[str, Any]:
    """What `config_from_dict` of torchao makes a configuration of: FP8 with 2:4 for some layers.

    Args:
        modules: layers of vLLM; every other stays as it is.
    """
    by_row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    packing = {"_type": "Float8PackingFormat", "_data": "SPARSE_2D_DATA_2D_METADATA"}
    sparse = {
        "_type": "Float8DynamicActivationFloat8WeightConfig",
        "_version": 2,
        "_data": {"granularity": [by_row, by_row], "packing_format": packing},
    }
    return {
        "_type": "ModuleFqnToConfig",
        "_version": 1,
        "_data": {"module_fqn_to_config": dict.fromkeys(modules, sparse)},
    }


def _group(kind: str) -> dict[str, Any]:
    common = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False}
    return {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel"},
        "input_activations": {**common, "strategy": "tensor"},
        "output_activations": None,
    }


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
