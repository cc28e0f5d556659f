"""What a model directory may hold beside or instead of sound weights, and what is read of it."""

import errno
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import BERT, CPU, LLAMA, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.records import ModelInfo
from prox24_deploy.model.directory import companion_files, load_model, model_info, open_model_dir
from prox24_deploy.model.processors import load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def encoder(tmp_path: Path, tiny_bert: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "encoder"))


@pytest.fixture
def decoder(tmp_path: Path, tiny_llama: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "decoder"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes), encoding="utf-8")


def edit_weights(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def describe(path: Path, recipe: Recipe) -> ModelInfo:
    return model_info(open_model_dir(path), recipe)


def assert_one_sentence(error: Exception, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert not text.endswith("..")
    for part in parts:
        assert part in text


def header_cuts(file: Path) -> list[int]:
    """Sizes that cut a safetensors file in its length, in its header and in its data."""
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    return [0, 1, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 9 + header, size - 1]


def test_weights_cut_anywhere_are_refused(encoder: Path) -> None:
    file = encoder / "model.safetensors"
    whole = file.read_bytes()
    for kept in header_cuts(file):
        file.write_bytes(whole[:kept])
        with pytest.raises(ModelDirError, match="is damaged") as caught:
            open_model_dir(encoder)
        assert_one_sentence(caught.value, str(file), "download it again")


def test_weights_with_a_false_header_are_refused(encoder: Path) -> None:
    file = encoder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole + b"\0", b"\xff" * 8 + whole[8:], whole[:8] + b"]" + whole[9:]):
        file.write_bytes(damaged)
        with pytest.raises(ModelDirError, match=r"model\.safetensors is damaged"):
            open_model_dir(encoder)


def test_a_damaged_shard_is_named_and_not_only_the_first_is_read(decoder: Path) -> None:
    last = decoder / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ModelDirError, match=r"00003-of-00003\.safetensors is damaged"):
        open_model_dir(decoder)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_nan_is_found_in_every_float_type(encoder: Path, dtype: torch.dtype) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weight = weights["encoder.layer.1.output.dense.weight"].to(dtype)
        # All bits set are a NaN in every one of these formats.
        weight.view(torch.uint8)[3, 8 * dtype.itemsize : 9 * dtype.itemsize] = 0xFF
        weights["encoder.layer.1.output.dense.weight"] = weight

    edit_weights(encoder / "model.safetensors", spoil)
    with pytest.raises(ModelDirError, match=r"encoder\.layer\.1\.output\.dense\.weight") as caught:
        open_model_dir(encoder)
    assert_one_sentence(caught.value, str(encoder / "model.safetensors"))


def test_integers_beside_the_weights_are_no_fault(encoder: Path) -> None:
    def add(weights: dict[str, Tensor]) -> None:
        weights["embeddings.position_ids"] = torch.arange(128)

    edit_weights(encoder / "model.safetensors", add)
    directory = open_model_dir(encoder)
    assert directory.tensors["embeddings.position_ids"].dtype == torch.int64
    assert model_info(directory, BERT).source_dtype == "float32"


@pytest.mark.parametrize("tensors", [{}, {"steps": torch.arange(3)}])
def test_weight_files_without_weights_are_refused(
    encoder: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelDirError) as caught:
        describe(encoder, BERT)
    assert_one_sentence(caught.value, str(encoder))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"metadata": {}}',
        '{"weight_map": null}',
        '{"weight_map": ["model-00001-of-00003.safetensors"]}',
        '{"weight_map": {"a": ["model-00001-of-00003.safetensors"]}}',
        '{"weight_map": {"a": 1, "b": "model-00001-of-00003.safetensors"}}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "' + "x" * 300 + '"}}',
        '{"weight_map": {"a": "x\\u0000"}}',
        '{"weight_map": {"a": "\\ud800"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "b", "a": "c"}}',
        '{"weight_map": ' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
def test_an_index_without_a_readable_map_is_refused(decoder: Path, content: str) -> None:
    (decoder / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(ModelDirError) as caught:
        describe(decoder, LLAMA)
    assert_one_sentence(caught.value, str(decoder))


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Root, which tests may be, reads everything."""
    whole = os.open

    def checked(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(os, "open", checked)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00003.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_missing(
    decoder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_open(monkeypatch, name)
    with pytest.raises(ModelDirError, match=r"cannot be read \(Permission denied\)") as caught:
        open_model_dir(decoder)
    assert_one_sentence(caught.value, str(decoder / name))


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_document_that_nests_deeply_is_one_sentence(decoder: Path, name: str) -> None:
    (decoder / name).write_text(
        '{"model_type": "llama", "a": ' + '{"b": ' * 5000 + "1" + "}" * 5001
    )
    with pytest.raises(ModelDirError, match="nests deeper than 100 levels") as caught:
        open_model_dir(decoder)
    assert_one_sentence(caught.value, str(decoder / name))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": "32"}, "hidden_size.*expected int, got str"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"vocab_size": [1]}, "vocab_size"),
    ],
)
def test_a_wrong_value_is_blamed_on_the_config_and_not_on_the_tokenizer(
    encoder: Path, changes: dict[str, Any], reason: str
) -> None:
    edit_json(encoder / "config.json", **changes)
    with pytest.raises(ModelDirError, match=rf"config\.json holds .*{reason}") as caught:
        load_tokenizer(open_model_dir(encoder))
    assert_one_sentence(caught.value, str(encoder))
    assert "tokenizer" not in str(caught.value)


def test_an_index_never_leads_out_of_the_directory(decoder: Path) -> None:
    outside = decoder.parent / "outside"
    outside.mkdir()
    names = json.loads((decoder / INDEX).read_bytes())["weight_map"]
    for file in decoder.glob("*.safetensors"):
        # The target exists and is sound: only the path is wrong with it.
        shutil.copyfile(file, outside / file.name)
        for place in (f"../outside/{file.name}", str(outside / file.name), f"./{file.name}"):
            moved = {n: place if shard == file.name else shard for n, shard in names.items()}
            (decoder / INDEX).write_text(json.dumps({"weight_map": moved}), encoding="utf-8")
            with pytest.raises(ModelDirError, match="expected a plain file name") as caught:
                open_model_dir(decoder)
            assert_one_sentence(caught.value, INDEX, place)


def test_the_weights_that_are_checked_are_those_that_are_loaded(decoder: Path) -> None:
    # transformers prefers the single file where both are there.
    merged = {k: v for file in decoder.glob("*.safetensors") for k, v in load_file(file).items()}
    other = {name: tensor.flip(0).contiguous() for name, tensor in merged.items()}
    save_file(other, decoder / "model.safetensors", {"format": "pt"})
    directory = open_model_dir(decoder)
    parameters = dict(load_model(directory, LLAMA, CPU).named_parameters())
    for name, stored in directory.tensors.items():
        assert torch.equal(load_file(stored.shard)[name].float(), parameters[name]), name


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "last.ckpt", "model.pkl"])
def test_every_kind_of_pickle_is_recognised(encoder: Path, name: str) -> None:
    (encoder / "model.safetensors").unlink()
    (encoder / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelDirError, match="only pickled weights") as caught:
        open_model_dir(encoder)
    assert_one_sentence(caught.value, str(encoder), "safe_serialization=True")


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    pickle.loads(pickle.dumps(_Bomb(mark)))
    assert mark.exists()


def test_pickles_beside_shards_are_neither_opened_nor_hashed(decoder: Path) -> None:
    sound = open_model_dir(decoder).sha256
    mark = decoder / "exploded"
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl")
    for name in names:
        (decoder / name).write_bytes(pickle.dumps(_Bomb(mark)))
    directory = open_model_dir(decoder)
    load_model(directory, LLAMA, CPU)
    load_tokenizer(directory)
    assert not mark.exists()
    assert directory.sha256 == sound
    assert not set(names) & {file.name for file in companion_files(decoder)}


def test_code_of_an_unknown_family_is_not_run(encoder: Path) -> None:
    mark = encoder / "exploded"
    (encoder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    edit_json(
        encoder / "config.json",
        model_type="unheard-of",
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    )
    edit_json(
        encoder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]},
    )
    directory = open_model_dir(encoder)
    with pytest.raises(ModelDirError, match="does not open as feature-extraction") as caught:
        load_model(directory, BERT, CPU)
    assert_one_sentence(caught.value, str(encoder))
    # transformers opens the configuration before the tokenizer, and that names code already.
    with pytest.raises(ModelDirError, match=r"config\.json holds .* custom code") as caught:
        load_tokenizer(directory)
    assert_one_sentence(caught.value, str(encoder))
    assert not mark.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "no such function"},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"pad_token_id": 9999},
    ],
)
def test_a_config_of_wrong_values_is_one_sentence(encoder: Path, changes: dict[str, Any]) -> None:
    edit_json(encoder / "config.json", **changes)
    directory = open_model_dir(encoder)
    with pytest.raises(ModelDirError, match="does not open as feature-extraction") as caught:
        load_model(directory, BERT, CPU)
    assert_one_sentence(caught.value, str(encoder))


def test_a_directory_without_a_config_is_refused(encoder: Path) -> None:
    (encoder / "config.json").unlink()
    with pytest.raises(ModelDirError, match=r"has no config\.json") as caught:
        open_model_dir(encoder)
    assert_one_sentence(caught.value, str(encoder), "save_pretrained")


def test_a_config_that_is_not_text_is_refused(encoder: Path) -> None:
    (encoder / "config.json").write_bytes(b'{"model_type": "b\xe9rt"}')
    with pytest.raises(ModelDirError, match=r"config\.json is not readable JSON") as caught:
        open_model_dir(encoder)
    assert_one_sentence(caught.value, str(encoder))


def test_a_config_of_more_layers_counts_what_is_missing(encoder: Path) -> None:
    edit_json(encoder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelDirError, match=r"lacks weight encoder\.layer\.2\..* and 15 more"):
        load(encoder, BERT)


def test_a_config_of_another_width_names_a_weight_and_both_shapes(encoder: Path) -> None:
    edit_json(encoder / "config.json", intermediate_size=60)
    with pytest.raises(ModelDirError, match=r"\(64,\).*\(60,\)") as caught:
        load(encoder, BERT)
    assert_one_sentence(caught.value, "encoder.layer.0.intermediate.dense.bias", "config.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "Unheard"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_that_does_not_open_is_one_sentence(
    encoder: Path, name: str, content: str
) -> None:
    (encoder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelDirError, match="no tokenizer") as caught:
        load_tokenizer(open_model_dir(encoder))
    assert_one_sentence(caught.value, str(encoder))


def test_a_family_whose_tokenizer_needs_no_file_is_refused_without_one(encoder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (encoder / name).unlink()
    with pytest.raises(ModelDirError, match=r"has no tokenizer, expected one of .*vocab\.txt"):
        load_tokenizer(open_model_dir(encoder))


def test_a_tokenizer_opens_and_knows_its_words(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(open_model_dir(tiny_llama))
    assert tokenizer.decode(tokenizer("sparse kernel")["input_ids"]) == "sparse kernel"


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_llama"])
def test_a_change_of_any_file_changes_the_hash(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "model"))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}", encoding="utf-8")
    sound = open_model_dir(path).sha256
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        before = file.read_bytes()
        if file.suffix == ".safetensors":
            # Another value of one weight, still finite.
            file.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
        else:
            file.write_bytes(before + b"\n")
        assert open_model_dir(path).sha256 != sound, file.name
        file.write_bytes(before)
    assert open_model_dir(path).sha256 == sound


def test_the_hash_covers_names_and_new_files(encoder: Path) -> None:
    hashes = {open_model_dir(encoder).sha256}
    (encoder / "vocab.txt").write_text("a", encoding="utf-8")
    hashes.add(open_model_dir(encoder).sha256)
    # Another name in the same place of the order, with the same content.
    (encoder / "vocab.txt").rename(encoder / "words.txt")
    hashes.add(open_model_dir(encoder).sha256)
    assert len(hashes) == 3


def test_companions_are_configuration_and_words_but_never_code(tmp_path: Path) -> None:
    # The directory itself may lie in a hidden folder, as the Hub's cache does.
    path = tmp_path / ".cache" / "model"
    wanted = [
        "1_Pooling/config.json", "LICENSE", "README.md", "bpe.codes", "chat_template.jinja",
        "config.json", "merges.txt", "pieces.spm", "recipe.toml", "sentencepiece.model", "vocab",
        "words.vocab",
    ]  # fmt: skip
    unwanted = [
        ".git/config.json", ".hidden.json", "1_Pooling/.cache/x.json", "Makefile",
        "modeling.py", "setup.sh",
        "model.safetensors", "pytorch_model.bin", "weights.h5", INDEX,
    ]  # fmt: skip
    for name in (*wanted, *unwanted):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x", encoding="utf-8")
    assert [p.relative_to(path).as_posix() for p in companion_files(path)] == wanted


def test_the_dtype_is_that_of_most_elements_and_integers_do_not_count(encoder: Path) -> None:
    def mix(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            # Many small tensors stay float32; most elements do not.
            if weights[name].numel() > 1000:
                weights[name] = weights[name].bfloat16()
        weights["embeddings.position_ids"] = torch.arange(100_000)

    floats = sum(weight.numel() for weight in load_file(encoder / "model.safetensors").values())
    edit_weights(encoder / "model.safetensors", mix)
    directory = open_model_dir(encoder)
    dtypes = [tensor.dtype for tensor in directory.tensors.values()]
    assert dtypes.count(torch.float32) > dtypes.count(torch.bfloat16) > 0
    info = model_info(directory, BERT)
    assert (info.parameters, info.source_dtype) == (floats, "bfloat16")


def test_the_model_is_described_by_its_config(encoder: Path) -> None:
    info = describe(encoder, BERT)
    assert (info.model_type, info.architecture) == ("bert", "BertModel")
    assert (info.family, info.task) == ("bert", "feature-extraction")
    assert info.path == str(encoder.resolve())
    assert info.sha256 == open_model_dir(encoder).sha256
    edit_json(encoder / "config.json", architectures=None)
    assert describe(encoder, BERT).architecture == "unknown"


def test_an_error_without_a_text_is_told_by_its_kind(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(AutoModel, "from_pretrained", fail)
    with pytest.raises(ModelDirError, match=r"feature-extraction: OSError\.$"):
        load_model(open_model_dir(encoder), BERT, CPU)


def test_too_little_memory_is_no_fault_of_the_directory(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModel, "from_pretrained", fail)
    with pytest.raises(MemoryError):
        load_model(open_model_dir(encoder), BERT, CPU)


def test_opening_says_nothing_not_even_of_a_pooler_made_at_random(
    tiny_bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = open_model_dir(tiny_bert)
    # Whatever another test or library has asked of transformers.
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    load_model(directory, BERT, CPU)
    load_tokenizer(directory)
    assert capfd.readouterr() == ("", "")
    # Its handler may hold a stream that no capture sees.
    assert transformers_logging.get_verbosity() == logging.ERROR


def test_a_model_is_built_in_float32_for_inference(tiny_llama: Path) -> None:
    directory = open_model_dir(tiny_llama)
    model = load_model(directory, LLAMA, CPU)
    assert not model.training
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(directory.tensors)
    for name, stored in directory.tensors.items():
        assert stored.dtype == torch.float16
        assert parameters[name].dtype == torch.float32
        assert not parameters[name].requires_grad
        assert stored.numel == parameters[name].numel()
        assert torch.equal(load_file(stored.shard)[name].float(), parameters[name])
