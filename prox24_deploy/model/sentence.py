"""What a sentence-transformers directory makes of hidden states: modules.json and what it names.

Such a directory is a list of modules: a Transformer, a Pooling, and any of Dense, LayerNorm,
Normalize and Dropout behind it. Names, options and defaults are those of sentence-transformers 6.2,
older spellings included. A module or an option that has no equal here is refused by name, for
anything else would give other embeddings than the library does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from prox24_deploy.config.recipe import EMBEDDING, PoolingMode, Recipe, TensorSpec
from prox24_deploy.core.documents import Document, read_json, read_object
from prox24_deploy.core.errors import ModelDirError, RecipeError
from prox24_deploy.core.modalities import TEXT

MODULES_FILE = "modules.json"
WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_LIBRARY_FILE = "config_sentence_transformers.json"
_LIBRARY = "SentenceTransformer"
# The first of them that is there counts; newer versions write the first for every family.
_TRANSFORMER_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_LONE_POOLING = "1_Pooling"
_REMEDY = "open it with SentenceTransformer, change that, and save it again"

_WEIGHTED = ("Dense", "LayerNorm")
ACTIVATIONS = (
    "Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Softsign",
)  # fmt: skip
# Flags of older versions, in the order in which what they pool is joined.
_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# The options of a module, each with the values under which it is what is done here; () is any.
_Options = Mapping[str, tuple[object, ...]]
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
_ON_SENTENCES: _Options = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
}
# The library itself ignores a wish for remote code that stands in a file.
_NO_ARGUMENTS: tuple[object, ...] = (
    None,
    {},
    {"trust_remote_code": True},
    {"trust_remote_code": False},
)
_TRANSFORMER: _Options = {
    "max_seq_length": (),
    "do_lower_case": (),
    # Lengths of the two sides of a search, asked for when a text is encoded.
    "query_length": (),
    "document_length": (),
    "modality_config": (),
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "unpad_inputs": (),
    "query_expansion": (None,),
    "processing_kwargs": (None, {}),
    "tokenizer_name_or_path": (None,),
    **dict.fromkeys(("model_args", "tokenizer_args", "config_args"), _NO_ARGUMENTS),
    **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), _NO_ARGUMENTS),
}
# The kinds of module behind the Transformer, with the options of each.
_OPTIONS: dict[str, _Options] = {
    "Pooling": {
        "embedding_dimension": (),
        "word_embedding_dimension": (),
        "pooling_mode": (),
        # The graph cannot tell a prompt from the text behind it.
        "include_prompt": (True,),
        **dict.fromkeys(_FLAGS, ()),
    },
    "Dense": {
        "in_features": (),
        "out_features": (),
        "bias": (),
        "activation_function": (),
        "use_residual": (),
        **_ON_SENTENCES,
    },
    "LayerNorm": {"dimension": ()},
    "Normalize": _ON_SENTENCES,
    "Dropout": {"dropout": ()},
}


@dataclass(frozen=True, slots=True)
class SentenceModule:
    """One module: its class in the library, its folder, and the options that it has there."""

    kind: str
    folder: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePipeline:
    """What becomes of a text before the model reads it, and of the hidden states behind it.

    Attributes:
        poolings: modes of the Pooling, whose vectors are joined; empty where there is none.
        steps: the modules behind the Pooling, in order.
        max_length: tokens at which texts are cut; None leaves it to the tokenizer.
        lower_case: whether texts are put in lower case.
        prompt: what is put in front of every text.
        listed: whether modules.json lists the modules; without it nothing is known of any behind
            the Pooling.
    """

    poolings: tuple[PoolingMode, ...]
    steps: tuple[SentenceModule, ...]
    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""
    listed: bool = True

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Weights of the modules, as paths in the directory."""
        return tuple(f"{m.folder}/{WEIGHTS_FILE}" for m in self.steps if m.kind in _WEIGHTED)


def read_pipeline(path: Path) -> SentencePipeline | None:
    """Read how a directory embeds sentences; None where it says nothing of that.

    A Pooling without a list of modules counts as the only one. A CrossEncoder scores with the head
    of its model and embeds nothing.

    Raises:
        ModelDirError: a file cannot be read, or a module or an option is not supported.
    """
    if not (path / MODULES_FILE).is_file():
        if not (path / _LONE_POOLING / _CONFIG_FILE).is_file():
            return None
        lone = _module(path, "Pooling", _LONE_POOLING)
        return SentencePipeline(poolings=_poolings(path, lone), steps=(), listed=False)
    library = _json(path / _LIBRARY_FILE)
    modules = tuple(_modules(path))
    made_for = library.get("model_type", _LIBRARY)
    if made_for == "CrossEncoder" and not modules:
        return None
    if made_for != _LIBRARY:
        raise ModelDirError(
            f"{path / _LIBRARY_FILE} is of a {made_for} with {len(modules)} modules behind its "
            f"Transformer, expected a {_LIBRARY}; models of that kind are not supported."
        )
    _require_order(path, modules)
    text = _options(_transformer_file(path), _TRANSFORMER)
    _require_hidden_states(path, text.get("modality_config"))
    return SentencePipeline(
        poolings=_poolings(path, modules[0]) if modules else (),
        steps=modules[1:],
        max_length=_length(path, text.get("max_seq_length")),
        lower_case=bool(text.get("do_lower_case")),
        prompt=_prompt(path, library),
    )


def module_weights(path: Path) -> list[Path]:
    """The weight files of the modules that a directory lists, whatever else is wrong with them."""
    try:
        listed = _parsed(path / MODULES_FILE)
        folders = [PurePosixPath(entry["path"]) for entry in listed]
    except (ModelDirError, KeyError, TypeError):
        return []
    files = [path / folder / WEIGHTS_FILE for folder in folders if _is_inside(folder)]
    return [file for file in files if file.is_file()]


def settled(path: Path, recipe: Recipe) -> SentencePipeline | None:
    """What embeds the texts of a model: the modules of its directory, or those of a recipe.

    Raises:
        ModelDirError: as `read_pipeline`.
        RecipeError: the two say different things, or modules are listed and none of them pools.
    """
    if not recipe.kind.embeds_text or recipe.modality is not TEXT:
        return None
    found, asked = read_pipeline(path), recipe.embedding
    if asked is None:
        if found is not None and not found.poolings:
            raise RecipeError(
                f"{path / MODULES_FILE} lists no Pooling, so that nothing makes one embedding of "
                "the states of a text; add [embedding] to a recipe and pass it with --recipe."
            )
        return found
    steps = (SentenceModule("Normalize", "Normalize", {}),) if asked.normalize else ()
    wanted = [asked.pooling, *(module.kind for module in steps)]
    if found is None or not found.poolings:
        return replace(
            found or SentencePipeline(poolings=(), steps=()), poolings=(asked.pooling,), steps=steps
        )
    if not found.listed:
        found = replace(found, steps=steps)
    said = [*found.poolings, *(module.kind for module in found.steps if module.kind != "Dropout")]
    if said != wanted:
        raise RecipeError(
            f"Recipe {recipe.family} embeds by {', '.join(wanted)}, but {path} declares "
            f"{', '.join(said)}; correct [embedding], or leave it and its output out."
        )
    return found


def fitted_to_sentences(recipe: Recipe, architecture: str, path: Path) -> Recipe:
    """The recipe for a model of a class, with the output that the modules of its directory add.

    With a list of modules it is the one for embeddings whatever the class, as in the library.

    Raises:
        ModelDirError: as `read_pipeline`.
        RecipeError: as `settled`, or the recipe cannot give embeddings.
    """
    found = read_pipeline(path)
    embeds = found is not None and found.listed
    fitted = recipe.for_embeddings() if embeds else recipe.for_architecture(architecture)
    pipeline = settled(path, fitted)
    if pipeline is None:
        return fitted
    if "attention_mask" not in [spec.name for spec in fitted.inputs]:
        raise RecipeError(
            f"Recipe {fitted.family} has no input 'attention_mask', without which the states of a "
            "text cannot be pooled; add it."
        )
    length = min(pipeline.max_length or fitted.sequence_length, fitted.sequence_length)
    outputs = list(fitted.outputs)
    if EMBEDDING not in [spec.name for spec in outputs]:
        outputs.append(TensorSpec(name=EMBEDDING, dtype="float", axes=["batch", "embedding"]))
    return fitted.model_copy(update={"outputs": outputs, "sequence_length": length})


def _modules(path: Path) -> Iterator[SentenceModule]:
    """The modules behind the Transformer, which comes first and in the directory itself."""
    file = path / MODULES_FILE
    listed = _parsed(file)
    if not isinstance(listed, list) or not listed:
        raise ModelDirError(f"{file} is no list of modules; restore it.")
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise ModelDirError(f"{file} does not name the type of module {number}; restore it.")
        package, _, kind = entry["type"].rpartition(".")
        if package.split(".")[0] != "sentence_transformers":
            raise ModelDirError(
                f"{file} lists the module {entry['type']}, expected those of sentence-transformers "
                "alone; code of others is not run."
            )
        folder = str(entry.get("path", ""))
        if (kind == "Transformer") != (number == 0):
            raise ModelDirError(
                f"{file} has {kind} in place {number}, expected one Transformer, and it first; "
                "models of another make are not supported."
            )
        if number == 0:
            _require_in_root(path, folder)
        elif kind in _OPTIONS:
            yield _module(path, kind, folder)
        else:
            raise ModelDirError(
                f"{file} lists the module {kind}, expected {', '.join(_OPTIONS)} behind the "
                "Transformer; others are not supported."
            )


def _require_in_root(path: Path, folder: str) -> None:
    if folder not in {"", "."}:
        raise ModelDirError(
            f"{path / MODULES_FILE} keeps the Transformer in {folder!r}, expected the directory "
            "itself; open it with SentenceTransformer and save it again, which moves it there."
        )


def _module(path: Path, kind: str, folder: str) -> SentenceModule:
    if not _is_inside(PurePosixPath(folder)):
        raise ModelDirError(
            f"{path / MODULES_FILE} keeps a {kind} in {folder!r}, expected a folder of its own in "
            "the directory; restore it."
        )
    module = SentenceModule(kind, folder, _options(path / folder / _CONFIG_FILE, _OPTIONS[kind]))
    if kind in _WEIGHTED and not (path / folder / WEIGHTS_FILE).is_file():
        raise ModelDirError(
            f"Module {kind} of {path} has no {folder}/{WEIGHTS_FILE}; add it, and where its "
            "weights are pickled, open the directory with SentenceTransformer and save it again."
        )
    if kind == "Dense":
        _require_activation(path / folder / _CONFIG_FILE, module.options)
    return module


def _is_inside(folder: PurePosixPath) -> bool:
    """Whether it is a folder below the directory that names it."""
    return bool(folder.parts) and not folder.is_absolute() and ".." not in folder.parts


def _require_activation(file: Path, options: Mapping[str, Any]) -> None:
    named = options.get("activation_function", "torch.nn.Tanh")
    package, _, name = str(named).rpartition(".")
    if package.split(".")[:2] != ["torch", "nn"] or name not in ACTIVATIONS:
        raise ModelDirError(
            f"{file} has the activation_function {named!r}, expected one of torch.nn: "
            f"{', '.join(ACTIVATIONS)}; {_REMEDY}."
        )


def _require_order(path: Path, modules: tuple[SentenceModule, ...]) -> None:
    kinds = [module.kind for module in modules]
    if kinds.count("Pooling") > 1 or (kinds and kinds[0] != "Pooling"):
        raise ModelDirError(
            f"{path / MODULES_FILE} lists {', '.join(kinds)} behind the Transformer, expected one "
            "Pooling, and it first; models of another make are not supported."
        )


def _require_hidden_states(path: Path, modalities: object) -> None:
    if modalities is None:
        return
    text = modalities.get("text") if isinstance(modalities, dict) else None
    taken = text and {key: text[key] for key in _TEXT if key in text}
    if taken != _TEXT and taken != _TEXT | {"method_output_name": ["last_hidden_state"]}:
        raise ModelDirError(
            f"{_transformer_file(path)} takes {text!r} of the model for text, expected its "
            "last_hidden_state; models of another make are not supported."
        )


def _length(path: Path, value: object) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ModelDirError(
            f"{_transformer_file(path)} has max_seq_length {value!r}, expected a whole number of "
            f"tokens from 1; {_REMEDY}."
        )
    return value


def _poolings(path: Path, module: SentenceModule) -> tuple[PoolingMode, ...]:
    options, file = module.options, path / module.folder / _CONFIG_FILE
    if not file.is_file():
        raise ModelDirError(f"Module Pooling of {path} has no {file}; restore it.")
    named = options.get("pooling_mode")
    if named is None:
        named = [mode for flag, mode in _FLAGS.items() if options.get(flag) is True] or ["mean"]
    modes = [named] if isinstance(named, str) else named
    known = get_args(PoolingMode)
    if not isinstance(modes, list) or not modes or not all(mode in known for mode in modes):
        raise ModelDirError(
            f"{file} asks for pooling {named!r}, expected one or more of {', '.join(known)}; "
            f"{_REMEDY}."
        )
    return tuple(modes)


def _prompt(path: Path, library: Mapping[str, Any]) -> str:
    """The prompt that stands in front of a text for which none is asked."""
    name, prompts = library.get("default_prompt_name"), library.get("prompts")
    if name is None:
        return ""
    prompt = None
    if isinstance(prompts, dict) and isinstance(name, str):
        prompt = prompts.get(name)
    if not isinstance(prompt, str):
        raise ModelDirError(
            f"{path / _LIBRARY_FILE} has the default_prompt_name {name!r} and {prompt!r} under "
            "prompts for it, expected a text; correct one of them."
        )
    return prompt


def _transformer_file(path: Path) -> Path:
    files = [path / name for name in _TRANSFORMER_FILES]
    return next((file for file in files if file.is_file()), files[0])


def _options(file: Path, known: _Options) -> dict[str, Any]:
    """The options in a file, {} where it is not there; each known, with a value that is known."""
    options = _json(file)
    for name, value in options.items():
        if name not in known or (known[name] and value not in known[name]):
            wanted = " or ".join(repr(each) for each in known.get(name, ()))
            expected = f"expected {wanted}" if wanted else "which is not known here"
            raise ModelDirError(f"{file} has the option {name} {value!r}, {expected}; {_REMEDY}.")
    return options


def _json(file: Path) -> dict[str, Any]:
    return read_object(file, _document(file)) if file.is_file() else {}


def _parsed(file: Path) -> Any:
    return read_json(file, _document(file))


def _document(file: Path) -> Document:
    return Document(str(file), ModelDirError, "restore it")
