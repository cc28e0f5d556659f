"""Every parser that `fuzz.py` tries: what is spoilt, and how the command line reads it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_binaries import (
    declare_sparse,
    spoil_bytes,
    spoil_image,
    spoil_onnx,
    spoil_safetensors,
    spoil_wave,
)
from fuzz_documents import Spoiled, spoil_json, spoil_lines, spoil_text, spoil_toml
from resealed import resealed

from prox24_deploy.cli import build as building
from prox24_deploy.cli import compare as gating
from prox24_deploy.cli import inspect as judging
from prox24_deploy.cli import package as handing
from prox24_deploy.config.options import BuildOptions, TextOptions
from prox24_deploy.config.recipe import parse_recipe, shipped_recipes
from prox24_deploy.data.images import Images, make_image_samples
from prox24_deploy.data.pairs import make_pairs
from prox24_deploy.data.recordings import read_recordings, read_wave
from prox24_deploy.data.text import make_samples, read_texts
from prox24_deploy.engines.cusparselt.planning import read_plan
from prox24_deploy.engines.cusparselt.profile import GemmShape, read_profile
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.processors import load_image_processor, open_tokenizer
from prox24_deploy.pipeline.context import read_context
from prox24_deploy.sparsity.declaration import SPARSE_KEY

Spoiler = Callable[[bytes, Random], Spoiled]


@dataclass(frozen=True, slots=True)
class Victim:
    """Files of a room of which one is spoilt, in its place or as `place`.

    `sound` says that what is not spoilt is accepted; a dense file, for one, is refused by `check`.
    """

    glob: str
    spoil: Spoiler
    place: str = ""
    weight: int = 1
    sound: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """A spoilt file in a folder of its own, which holds all that belongs to it."""

    room: Path
    file: Path
    number: int

    @property
    def as_json(self) -> bool:
        """Every other input is asked for JSON."""
        return self.number % 2 == 1


@dataclass(frozen=True, slots=True)
class Target:
    """One parser.

    `room` is where its inputs come from, `command` what reproduces it. `prints` says that every
    other input is asked for JSON, and `writes_room` that a run may change other files of its room.
    `ways` is in how many ways inputs are read, by their numbers, `whole` that a run reads the whole
    folder of its file whichever file that is, and `share` how many of the inputs that are asked for
    it gets, where each takes long.
    """

    room: str
    victims: tuple[Victim, ...]
    run: Callable[[Case], None]
    command: str
    prints: bool = True
    writes_room: bool = False
    ways: int = 1
    whole: bool = False
    share: float = 1.0


# The room, what runs, what is read and its number.
SoundRun = tuple[str, Callable[[Case], None], str, int]


def unspoilt(target: Target, room: Path) -> Iterator[tuple[Path, Path]]:
    """Every file that must be accepted as it is, and where it is put."""
    for victim in target.victims:
        for source in sorted(room.glob(victim.glob)) if victim.sound else ():
            yield source, room / victim.place if victim.place else source


def sound_cases(target: Target, room: Path) -> dict[SoundRun, tuple[Path, Path]]:
    """The same for every run on what is not spoilt, by all that tells it from others."""
    found: dict[SoundRun, tuple[Path, Path]] = {}
    for source, place in unspoilt(target, room):
        read = place.relative_to(room).parts[0] if target.whole else f"{source} as {place}"
        for number in range(target.ways):
            found.setdefault((target.room, target.run, read, number), (source, place))
    return found


def choose(target: Target, room: Path, draw: Random) -> tuple[Path, Path, Spoiled]:
    """What is spoilt, where it is put, and what it becomes."""
    victim = draw.choices(target.victims, [each.weight for each in target.victims])[0]
    source = draw.choice(sorted(room.glob(victim.glob)))
    spoilt = victim.spoil(source.read_bytes(), draw)
    return source, room / victim.place if victim.place else source, spoilt


def _check(case: Case) -> None:
    judging.check(case.file, as_json=case.as_json)


def _open(case: Case) -> None:
    open_model_dir(case.room)


def _index(case: Case) -> None:
    if case.as_json:
        judging.check(case.room)
    else:
        open_model_dir(case.room)


# Of so many inputs the first is pruned, which takes ten times as long as to read all that it needs.
_ONE_IN = 8


def _prune(case: Case) -> None:
    model = case.room / case.file.relative_to(case.room).parts[0]
    kinds = {"vit": "images", "whisper": "recordings"}
    calibration, out = case.room / kinds.get(model.name, "text.txt"), case.room / "out"
    if case.number % _ONE_IN:
        text = TextOptions(
            calibration=(calibration,),
            calibration_tokens=2048,
            evaluation_tokens=2048,
            images=16,
            recordings=8,
        )
        context = read_context(model, out, BuildOptions(text=text))
        load_model(context.source, context.recipe, torch.device("cpu"))
        return
    building.prune(
        model,
        out=out,
        calibration=[calibration],
        calibration_tokens=2048,
        evaluation_tokens=2048,
        images=16,
        recordings=8,
        method="magnitude",
        refinement="none",
        as_json=case.as_json,
    )


def _report(case: Case) -> None:
    gating.compare(
        case.file, case.room / "baseline.json", out=case.room / "out", as_json=case.as_json
    )


def _baseline(case: Case) -> None:
    bundle = case.room / "bundle"
    ways: tuple[Callable[[], None], ...] = (
        lambda: gating.compare(bundle, case.file, out=case.room / "out", as_json=case.as_json),
        lambda: gating.show(case.file, as_json=case.as_json),
        lambda: gating.update(bundle, case.file, "again", as_json=case.as_json),
    )
    ways[case.number // 2 % len(ways)]()


def _limits(case: Case) -> None:
    bundle, baseline = case.room / "bundle", case.room / "baseline.json"
    gating.compare(bundle, baseline, limits=case.file, as_json=case.as_json)


def _manifest(case: Case) -> None:
    bundle, out = case.room / "bundle", case.room / "out"
    out.mkdir(exist_ok=True)
    ways: tuple[Callable[[], None], ...] = (
        lambda: judging.verify(bundle, as_json=case.as_json),
        lambda: handing.package(
            bundle,
            triton=out / "triton",
            sbom=out / "sbom.json",
            checksums=out / "sums",
            force=True,
            as_json=case.as_json,
        ),
        lambda: building.compile_engines(
            bundle, backend=["onnxruntime"], shapes=["batch=1 sequence=8"], as_json=case.as_json
        ),
    )
    ways[case.number // 2 % len(ways)]()


def _stage(case: Case) -> None:
    """As another version of the tool may have left it: the manifest vouches for the record."""
    manifest = case.room / "bundle" / "manifest.json"
    value = json.loads(manifest.read_bytes())
    data = case.file.read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    value["files"][case.file.relative_to(case.room / "bundle").as_posix()] = entry
    manifest.write_bytes(resealed(value))
    _manifest(case)


def _plan(case: Case) -> None:
    if case.file.name == "plan.json":
        _ = read_plan(case.file).left_dense
    else:
        read_profile(case.file).timing(GemmShape(n=96, k=64, m=16))


def _text(case: Case) -> None:
    texts, _ = read_texts((case.file,), (), 0)
    tokenizer, recipes = _tokenizer(case.room / "model"), _recipes()
    if case.number % 3:
        recipe = recipes["llama" if case.number % 3 == 1 else "bert"]
        make_samples(texts, tokenizer, recipe, tokens=1024, max_length=64)
    else:
        make_pairs(texts, tokenizer, recipes["t5"], tokens=1024, max_length=64, start=0)


def _wave(case: Case) -> None:
    if case.file.suffix == ".wav":
        read_wave(case.file, 16_000, 1.0)
    else:
        read_recordings((case.room / "recordings",), (), 0)


def _image(case: Case) -> None:
    found = Images("file", (str(case.room),), ((case.file, ""),))
    make_image_samples(found, _processor(case.room / "model"), {}, limit=1)


@cache
def _tokenizer(path: Path) -> Any:
    return open_tokenizer(path)


@cache
def _processor(path: Path) -> Any:
    return load_image_processor(path)


@cache
def _recipes() -> Mapping[str, Any]:
    return {name: parse_recipe(text, name) for name, text in shipped_recipes().items()}


def _spoil_manifest(data: bytes, draw: Random) -> Spoiled:
    """Most with the hash of itself that belongs to what it now says."""
    spoilt, story = spoil_json(data, draw)
    # What is none of JSON, or too deep for it, cannot be written by any version.
    with suppress(ValueError, RecursionError):
        value = json.loads(spoilt)
        if isinstance(value, dict) and draw.random() < 0.7:
            return resealed(value), story
    return spoilt, story


def _spoil_declaration(data: bytes, draw: Random) -> Spoiled:
    return declare_sparse(data, draw, SPARSE_KEY)


def clear_output(room: Path) -> None:
    """Remove what a run left; what it changed in place is written anew by the caller."""
    shutil.rmtree(room / "out", ignore_errors=True)


_TENSORS = (
    Victim("seeds/*.safetensors", spoil_safetensors, "model.safetensors", 4),
    Victim("seeds/*.safetensors", _spoil_declaration, "model.safetensors"),
)
_GIVEN = (
    "prox24-deploy prune {model} -o {room}/out --calibration {calibration} --method magnitude "
    "--refinement none --calibration-tokens 2048 --evaluation-tokens 2048 --images 16 "
    "--recordings 8"
)
TARGETS: dict[str, Target] = {
    "safetensors-check": Target(
        "tensor files",
        # Dense files, which are refused for that.
        tuple(replace(victim, sound=False) for victim in _TENSORS),
        _check,
        "prox24-deploy check {file}",
    ),
    "safetensors-open": Target("tensor files", _TENSORS, _open, "prox24-deploy prune {room}"),
    "index": Target(
        "index",
        (Victim("*.index.json", spoil_json),),
        _index,
        "prox24-deploy check {room}; prox24-deploy prune {room}",
        prints=False,
        ways=2,
    ),
    "config": Target(
        "models",
        (
            Victim("*/config.json", spoil_json, weight=4),
            Victim("*/generation_config.json", spoil_json),
        ),
        _prune,
        _GIVEN,
        ways=2,
        whole=True,
    ),
    "tokenizer": Target(
        "models",
        (
            Victim("*/tokenizer*.json", spoil_json, weight=8),
            Victim("*/special_tokens_map.json", spoil_json),
        ),
        _prune,
        _GIVEN,
        ways=2,
        whole=True,
    ),
    "recipe": Target(
        "models", (Victim("*/recipe.toml", spoil_toml),), _prune, _GIVEN, ways=2, whole=True
    ),
    "preprocessor": Target(
        "models",
        (Victim("*/preprocessor_config.json", spoil_json),),
        _prune,
        _GIVEN,
        share=0.2,
        ways=2,
        whole=True,
    ),
    "modules": Target(
        "models",
        (
            Victim("*/modules.json", spoil_json, weight=2),
            Victim("*/[0-9]_*/config.json", spoil_json, weight=2),
            Victim("*/*sentence_*.json", spoil_json),
        ),
        _prune,
        _GIVEN,
        share=0.2,
        ways=2,
        whole=True,
    ),
    "limits": Target(
        "bundle",
        (Victim("limits.toml", spoil_toml),),
        _limits,
        "prox24-deploy compare {room}/bundle {room}/baseline.json --limits {file}",
        ways=2,
    ),
    "baseline": Target(
        "bundle",
        (Victim("baseline.json", spoil_json),),
        _baseline,
        "prox24-deploy compare {room}/bundle {file} -o {room}/out; "
        "prox24-deploy baseline show {file}",
        ways=6,
    ),
    "report": Target(
        "bundle",
        (Victim("bundle/report.json", spoil_json),),
        _report,
        "prox24-deploy compare {file} {room}/baseline.json -o {room}/out",
        ways=2,
    ),
    "manifest": Target(
        "bundle",
        (Victim("bundle/manifest.json", _spoil_manifest),),
        _manifest,
        "prox24-deploy verify {room}/bundle; prox24-deploy compile {room}/bundle; "
        "prox24-deploy package {room}/bundle --force --sbom {room}/out.json --triton {room}/out",
        writes_room=True,
        ways=6,
    ),
    "stages": Target(
        "bundle",
        (
            Victim("bundle/stages/*.json", spoil_json),
            Victim("bundle/engines/*/*/*.json", spoil_json),
        ),
        _stage,
        "prox24-deploy compile {room}/bundle; "
        "prox24-deploy package {room}/bundle --force --sbom {room}/out.json --triton {room}/out",
        writes_room=True,
        share=0.2,
        ways=6,
    ),
    "plan": Target(
        "plans",
        (Victim("*.json", spoil_json),),
        _plan,
        "prox24-deploy build MODEL --plan {file}; prox24-deploy plan MODEL --gpu-profile {file}",
    ),
    "jsonl": Target(
        "texts",
        (Victim("*.jsonl", spoil_lines, "spoilt.jsonl"),),
        _text,
        "prox24-deploy prune {room}/model --calibration {file}",
        ways=3,
    ),
    "text": Target(
        "texts",
        (
            Victim("text.txt", spoil_text, "spoilt.txt"),
            Victim("text.txt", spoil_bytes, "spoilt.txt"),
        ),
        _text,
        "prox24-deploy prune {room}/model --calibration {file}",
        ways=3,
    ),
    "wav": Target(
        "waves",
        (
            Victim("seeds/*.wav", spoil_wave, "spoilt.wav", 8),
            Victim("recordings/list.jsonl", spoil_lines),
            Victim("recordings/*.txt", spoil_text),
        ),
        _wave,
        "prox24-deploy prune WHISPER --calibration {room}",
    ),
    "image": Target(
        "images",
        (
            Victim("seeds/[!o]*.img", spoil_image, "spoilt.png", 6),
            Victim("seeds/other-*.img", spoil_image, "spoilt.png", sound=False),
        ),
        _image,
        "prox24-deploy prune {room}/model --calibration {room}",
        share=0.2,
    ),
    "onnx": Target(
        "graphs",
        (
            Victim("seeds/[!-]*[!0-9].onnx", spoil_onnx, "spoilt.onnx", 30, sound=False),
            Victim("seeds/*-*.onnx", spoil_onnx, "spoilt.onnx", sound=False),
        ),
        _check,
        "prox24-deploy check {file}",
        share=0.2,
    ),
}
