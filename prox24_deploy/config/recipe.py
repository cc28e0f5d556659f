"""Read an export recipe: what must be known to prune and export one model family.

One recipe applies whole, never merged: `--recipe`, else `recipe.toml` of the model directory, else
the shipped recipe whose `model_types` lists the model.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from prox24_deploy.config.limits import Limits, MetricLimits
from prox24_deploy.core.documents import Document, parse_toml, read_toml_text
from prox24_deploy.core.errors import RecipeError
from prox24_deploy.core.modalities import ModalityKind, modality_of_inputs
from prox24_deploy.core.tasks import TASKS, Task, TaskKind
from prox24_deploy.core.types import Method, Preset, Refinement

RECIPE_FILE = "recipe.toml"
# The output with one embedding for each text, and where a model has the modules that compute it.
EMBEDDING = "sentence_embedding"
SENTENCE_MODULES = "sentence_modules"
# How hidden states become one vector; the names are those of sentence-transformers.
PoolingMode = Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
# The input that makes a graph the decoder of two; its last axis is as wide as the encoder.
STATES = "encoder_hidden_states"
_CACHE_AXIS = "past"
_SUM = " + "
# Of a static axis, and of samples: beyond every model, and within every memory.
_MOST_EXTENT = 2**20


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(_Table):
    """One graph input or output: an integer axis is static, a name makes it dynamic.

    An axis may also be a sum of names, as in "past + sequence".
    """

    name: str
    dtype: Literal["int64", "float"]
    axes: list[str | Annotated[int, Field(ge=1, le=_MOST_EXTENT)]]


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """An input or output of an ONNX graph: type as ONNX names it, a variable axis by its name."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


class Channels(_Table):
    """Channels inside a block whose order is free, since those who write them take any order along.

    `reads` is a glob over the layers whose input they are, the ones that gain by it. `writes` are
    globs over the layers whose output they are, and `vectors` over what lies between and has one
    value for each along its last axis; a model need not have those. A star of theirs stands for
    what the star of the same number in `reads` stood for.

    `rows` says which rows of a writing layer they are: "all", both "halves", where gate and up are
    one layer, or the "values" behind queries and keys. With `heads`, a key of config.json, they
    stay within their head of the values, in one order for all heads of queries that read it; a list
    there has the number for each block.
    """

    reads: str
    writes: Annotated[list[str], Field(min_length=1)]
    vectors: list[str] = []
    rows: Literal["all", "halves", "values"] = "all"
    heads: str | None = None


class NormReaders(_Table):
    """A norm, and globs over the layers that read what it gives, which nothing else does."""

    norm: str
    reads: Annotated[list[str], Field(min_length=1)]


class Stream(_Table):
    """What reads and writes the residual stream, so that it may come in any orthonormal basis.

    `tables` are the embeddings, `last` the norm behind the blocks with what reads it, such as the
    output layer; both are paths in the model. `norms` and `writes`, globs over the layers that add
    to the stream, are paths inside a block. Norms must take no mean and multiply each channel by
    a weight.
    """

    tables: Annotated[list[str], Field(min_length=1)]
    norms: Annotated[list[NormReaders], Field(min_length=1)]
    writes: Annotated[list[str], Field(min_length=1)]
    last: NormReaders


class ExpertLayers(_Table):
    """Where the blocks of a model have experts, and what the layers of each are called.

    `path` is that of the module with all experts inside a block, `stored` what the checkpoint has
    in its place, if that is another path. `gate`, `up` and `down` name the layers of one expert,
    which gives down(act(gate(x)) · up(x)), in the checkpoint; here a model has the same names.

    `exported` says on which tokens an expert runs in a graph. Those "routed" to it are the work of
    the model and take the operator NonZero, which TensorRT-RTX does not have. On "all" tokens, most
    of which then count for nothing, it is as many times the work as a token has experts to choose
    from for each that it takes, in shapes that are known beforehand.
    """

    path: str
    gate: str
    up: str
    down: str
    stored: str | None = None
    exported: Literal["routed", "all"] = "routed"

    def as_stored(self, name: str) -> str:
        """The name that the checkpoint has for a tensor of an expert; others stay as they are."""
        return name.replace(f".{self.path}.", f".{self.stored or self.path}.", 1)


class Decoder(_Table):
    """The second graph and the second list of blocks of an encoder-decoder.

    The recipe around it describes the encoder. Keys mean what they mean there. The inputs are
    those of the decoder alone: tokens, `encoder_hidden_states` and the mask of the encoder; the
    key/value cache of its self-attention is always added, and what it attends to in the encoder is
    projected anew in every step.
    """

    blocks: str
    targets: Annotated[list[str], Field(min_length=1)]
    ignore: list[str] = []
    channels: list[Channels] = []
    inputs: Annotated[list[TensorSpec], Field(min_length=1)]
    outputs: Annotated[list[TensorSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _reads_the_encoder(self) -> "Decoder":
        _require_unique_names(self.inputs, self.outputs)
        if STATES not in [spec.name for spec in self.inputs]:
            raise ValueError(f"[decoder] needs the input {STATES!r}")
        return self


class Head(_Table):
    """Another task that models of a family are saved for, with what differs from the recipe.

    It applies where `architectures` of config.json matches one of these globs. A head with inputs
    of its own has a cache only if they say so.
    """

    task: Task
    architectures: Annotated[list[str], Field(min_length=1)]
    blocks: str
    inputs: Annotated[list[TensorSpec], Field(min_length=1)] | None = None
    outputs: Annotated[list[TensorSpec], Field(min_length=1)]
    model_class: str | None = None
    decoder: Decoder | None = None

    @model_validator(mode="after")
    def _two_graphs_need_a_decoder(self) -> "Head":
        _require_decoder(self.task, self.decoder)
        return self


class Unsupported(_Table):
    """Architectures of a family, as globs, that are refused, and why; `reason` ends a sentence."""

    architectures: Annotated[list[str], Field(min_length=1)]
    reason: str


class Embedding(_Table):
    """How the graph turns hidden states into the output `sentence_embedding`, (batch, hidden)."""

    pooling: PoolingMode
    normalize: bool


class Override(_Table):
    """Other options for some layers; what is None stays as the command line says.

    `layers` is a glob over module paths, relative to a block or from the model on. Where several
    overrides match a layer, a later one wins.
    """

    layers: str
    method: Method | None = None
    preset: Preset | None = None
    refinement: Refinement | None = None


class Recipe(_Table):
    """Everything that is specific to a model family.

    `blocks` is the dotted path of the list of repeated blocks in the model that `task` opens;
    `targets` and `ignore` are glob patterns over module paths relative to a block; `overrides`
    prune some of the targets in another way. `channels` have a free order; the `stream` has a free
    basis, in models without one of the `heads`. `experts` says that blocks have some, each of which
    reads the tokens routed to it. Weights matching `optional_weights` (globs over full names) may
    be absent from a checkpoint. `sequence_length` is that of calibration and evaluation samples, in
    tokens, where the model allows as many.

    With `cache` the graph also takes `past_key_values.N.key` and `.value`, (batch, heads, past,
    head size), where `past` may be 0, and gives `present.N.key` and `.value`; pruning and
    evaluation run without. `attention` is the implementation of attention that the model is
    opened with, `model_class` a class of transformers in place of the one that `task` stands for.

    With `decoder` the model is an encoder-decoder and becomes two graphs; `parts` has them apart.

    A recipe with the input `pixel_values` is for images: the axes of it that are named "channels",
    "height" and "width" become those of what the model's own image processor makes. One with the
    input `input_features` is for recordings of speech; "mels", "frames" and, behind the stem of the
    encoder, "source" become those of config.json.
    """

    family: str
    model_types: list[str]
    task: Task
    blocks: str
    targets: Annotated[list[str], Field(min_length=1)]
    ignore: list[str] = []
    channels: list[Channels] = []
    stream: Stream | None = None
    experts: ExpertLayers | None = None
    overrides: list[Override] = []
    optional_weights: list[str] = []
    sequence_length: Annotated[int, Field(ge=8, le=_MOST_EXTENT)] = 512
    opset: Annotated[int, Field(ge=18, le=24)] = 20
    attention: Literal["default", "eager"] = "default"
    cache: bool = False
    inputs: Annotated[list[TensorSpec], Field(min_length=1)]
    outputs: Annotated[list[TensorSpec], Field(min_length=1)]
    model_class: str | None = None
    decoder: Decoder | None = None
    heads: list[Head] = []
    unsupported: list[Unsupported] = []
    embedding: Embedding | None = None
    limits: Limits = Limits()

    def for_architecture(self, architecture: str) -> "Recipe":
        """What applies to a model of this class: the first matching head, else the recipe itself.

        A head takes the place of the sentence embedding too.

        Raises:
            RecipeError: the recipe says that this class is not supported.
        """
        for refused in self.unsupported:
            if any(fnmatch(architecture, pattern) for pattern in refused.architectures):
                raise RecipeError(
                    f"Recipe {self.family} does not support {architecture}: {refused.reason}."
                )
        for head in self.heads:
            if any(fnmatch(architecture, pattern) for pattern in head.architectures):
                return self._with_head(head)
        return self

    def for_embeddings(self) -> "Recipe":
        """What applies to a model that embeds texts, whatever class it was saved from.

        Raises:
            RecipeError: neither the recipe nor any of its heads gives hidden states.
        """
        if self.kind.embeds_text:
            return self
        for head in self.heads:
            if TASKS[head.task].embeds_text:
                return self._with_head(head)
        raise RecipeError(
            f"Recipe {self.family} is for {self.task}, but the model embeds sentences; add "
            f"[[heads]] with the task 'feature-extraction' to it and pass it with --recipe."
        )

    def _with_head(self, head: Head) -> "Recipe":
        """The recipe with what a head says in place of its own, and no other head."""
        update = {name: getattr(head, name) for name in Head.model_fields}
        del update["architectures"]
        if head.inputs is None:
            del update["inputs"]
        else:
            update["cache"] = _CACHE_AXIS in dynamic_names(head.inputs)
        return self.model_copy(update=update | {"heads": [], "embedding": None, "stream": None})

    @property
    def kind(self) -> TaskKind:
        """What its task means for all that is done with a model."""
        return TASKS[self.task]

    @property
    def parts(self) -> tuple["Recipe", ...]:
        """One recipe for each graph of the model, in the order of a forward pass."""
        if self.decoder is None:
            return (self,)
        encoder = self.model_copy(update={"decoder": None})
        return encoder, encoder.model_copy(update={**dict(self.decoder), "cache": True})

    @property
    def graph(self) -> str:
        """Name of the one graph that this recipe, or part of one, describes."""
        if not self.kind.two_graphs:
            return "model"
        return "decoder" if self.is_decoder else "encoder"

    @property
    def is_decoder(self) -> bool:
        """Whether this is the second part of an encoder-decoder."""
        return any(spec.name == STATES for spec in self.inputs)

    @property
    def sha256(self) -> str:
        """Hash of what a recipe says of a model: its limits, comments and defaults do not count."""
        said = self.model_dump(exclude={"limits"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> dict[str, JsonValue]:
        """What a recipe says of a model, with its defaults: limits and comments do not count."""
        return self.model_dump(mode="json", exclude={"limits"})

    @property
    def modality(self) -> ModalityKind:
        """What the model reads."""
        names = frozenset(spec.name for spec in self.inputs)
        return modality_of_inputs(names, targets=self.decoder is not None)

    def with_sizes(self, sizes: Mapping[str, int]) -> "Recipe":
        """The recipe with these axes of its inputs, and of its decoder's, made static."""
        decoder = self.decoder and self.decoder.model_copy(
            update={"inputs": _sized(self.decoder.inputs, sizes)}
        )
        return self.model_copy(update={"inputs": _sized(self.inputs, sizes), "decoder": decoder})


def _sized(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> list[TensorSpec]:
    return [
        spec.model_copy(update={"axes": [sizes.get(str(axis), axis) for axis in spec.axes]})
        for spec in specs
    ]


def _require_unique_names(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in (*inputs, *outputs)]
    if len(set(names)) != len(names):
        raise ValueError(f"input and output names must differ, got {names}")


def _require_decoder(task: Task, decoder: Decoder | None) -> None:
    if TASKS[task].two_graphs != (decoder is not None):
        able = " and ".join(repr(kind.name) for kind in TASKS.values() if kind.two_graphs)
        raise ValueError(
            f"the tasks {able} and the table [decoder] need each other, got task {task!r} "
            f"{'with' if decoder else 'without'} it"
        )


def _require_consistent(recipe: Recipe) -> None:
    """Refuse a file whose tables do not go together.

    What is made of a recipe for one model, or one of its graphs, need not: so this is no part of
    what makes a `Recipe`, which travels between processes.
    """
    _require_unique_names(recipe.inputs, recipe.outputs)
    _require_decoder(recipe.task, recipe.decoder)
    if recipe.cache != (_CACHE_AXIS in dynamic_names(recipe.inputs)):
        raise ValueError(
            f"cache = {str(recipe.cache).lower()} needs an attention_mask with the axis "
            f"{'past + sequence' if recipe.cache else 'sequence'!r}"
        )
    if recipe.cache and not recipe.kind.decoder_alone:
        able = " or ".join(repr(kind.name) for kind in TASKS.values() if kind.decoder_alone)
        raise ValueError(f"cache = true needs the task {able}, got {recipe.task!r}")
    masked = "attention_mask" in [spec.name for spec in recipe.inputs]
    given = EMBEDDING in [spec.name for spec in recipe.outputs]
    if given != (recipe.embedding is not None) or (given and not masked):
        raise ValueError(
            f"[embedding] goes with the output {EMBEDDING!r} and the input 'attention_mask'"
        )


def dynamic_names(specs: Sequence[TensorSpec]) -> list[str]:
    """Names of the dynamic axes, in order of appearance; a sum counts as its terms."""
    axes = [axis for spec in specs for axis in spec.axes if isinstance(axis, str)]
    return list(dict.fromkeys(name for axis in axes for name in axis.split(_SUM)))


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of a tensor whose dynamic axes have these sizes."""
    return tuple(
        axis if isinstance(axis, int) else sum(sizes[name] for name in axis.split(_SUM))
        for axis in spec.axes
    )


def read_recipe(path: Path) -> Recipe:
    """Read one recipe file.

    Raises:
        RecipeError: the file is missing, is not TOML, or has a missing, unknown or wrong key.
    """
    return parse_recipe(read_toml_text(path, _document(path)), str(path))


def parse_recipe(text: str, source: str) -> Recipe:
    """Parse the TOML of one recipe; `source` names it in errors."""
    document = parse_toml(text, _document(source))
    try:
        recipe = Recipe.model_validate(document)
        _require_consistent(recipe)
    except ValidationError as error:
        raise RecipeError(f"Recipe {source}: {_first_problem(error)}.") from error
    except ValueError as error:
        raise RecipeError(f"Recipe {source}: {error}.") from error
    return recipe


def shipped_recipes() -> dict[str, str]:
    """Family name to TOML text of every recipe in the package, sorted by family."""
    folder = importlib.resources.files("prox24_deploy.recipes")
    found = {entry.name: entry for entry in folder.iterdir() if entry.name.endswith(".toml")}
    return {name.removesuffix(".toml"): found[name].read_text("utf-8") for name in sorted(found)}


def select_recipe(
    model_dir: Path,
    model_type: str,
    explicit: Path | None,
    advise: Callable[[], str] = str,
) -> tuple[Recipe, str]:
    """Choose the one recipe that applies and return it with its TOML text.

    `advise` is asked how to go on where none applies; "" leaves it at general advice.

    Raises:
        RecipeError: the chosen recipe cannot be read, or no shipped recipe knows `model_type`.
    """
    own = model_dir / RECIPE_FILE
    path = explicit or (own if own.is_file() else None)
    if path is not None:
        text = read_toml_text(path, _document(path))
        return parse_recipe(text, str(path)), text
    shipped = {name: (parse_recipe(text, name), text) for name, text in shipped_recipes().items()}
    for recipe, text in shipped.values():
        if model_type in recipe.model_types:
            return recipe, text
    known = ", ".join(f"{name} ({', '.join(r.model_types)})" for name, (r, _) in shipped.items())
    remedy, _, drawn = advise().partition("\n\n")
    remedy = remedy or (
        "copy the nearest one, adapt its blocks, targets, inputs and outputs, and pass it with "
        "--recipe."
    )
    raise RecipeError(
        f"No recipe supports model_type {model_type!r} of {model_dir}; shipped families are "
        f"{known}; {remedy}",
        attached=drawn,
    )


def _document(source: str | Path) -> Document:
    return Document(f"Recipe {source}", RecipeError, "pass a TOML file with --recipe")


def _first_problem(error: ValidationError) -> str:
    # A misspelt key is missing and unknown at once; the unknown one tells the user more.
    problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"]) or "the whole file"
    if problem["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {
            "inputs": TensorSpec,
            "outputs": TensorSpec,
            "limits": Limits,
            "overrides": Override,
            "heads": Head,
            "channels": Channels,
            "experts": ExpertLayers,
            "decoder": Decoder,
            "unsupported": Unsupported,
            "embedding": Embedding,
        }
        if problem["loc"][0] == "limits" and len(problem["loc"]) > 2:
            names = ", ".join(name.replace("_", "-") for name in MetricLimits.model_fields)
            return f"unknown key {where!r}; the keys of a metric are {names}"
        # The innermost table around the key: heads.0.decoder.inputs.1.axis lies in inputs.
        around = [str(part) for part in problem["loc"][:-1] if str(part) in tables]
        place = around[-1] if around else "a recipe"
        keys = ", ".join((tables[place] if around else Recipe).model_fields)
        return f"unknown key {where!r}; the keys of {place} are {keys}"
    if problem["type"] == "missing":
        return f"required key {where!r} is missing"
    if not problem["loc"]:
        return problem["msg"]
    return f"key {where!r}: {problem['msg']}, got {problem['input']!r}"
