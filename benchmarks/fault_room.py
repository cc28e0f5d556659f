"""Where a fault is tried: a model, texts and OUT under names that never change, and what is sound.

A room belongs to one worker. Every path on its command lines is relative to it, so that the keys of
stages do not depend on where it lies and an unfinished bundle can be put back.
"""

import importlib.util
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from fault_runs import (
    Ended,
    Prepare,
    Run,
    begin,
    differences,
    facts,
    finished_stages,
    hashes,
    leftovers,
)
from safetensors.torch import load_file, save_file
from tiny_directories import write_directory, write_prose

REPORT = "report"
_PRUNE = ("--calibration-tokens", "2048", "--evaluation-tokens", "3072", "--preset", "fast")
_REST = (
    "--engine-tokens", "3072", "--accept-loss", "embedding cosine=0",
    "--accept-loss", "nearest-neighbour agreement=0", "--shapes", "batch=1", "sequence=8",
    "--backend", "onnxruntime",
)  # fmt: skip
WEIGHTS = "model.safetensors"
SEALED = "sealed"
# What is changed, by the name of the file of the world that takes its place.
CHANGES = {
    "weights": (f"model/{WEIGHTS}", f"model-b/{WEIGHTS}"),
    "config": ("model/config.json", "config-b.json"),
    "tokenizer": ("model/tokenizer.json", "tokenizer-b.json"),
    "calibration": ("text.txt", "text-b.txt"),
    "evaluation": ("held-out.txt", "held-out-b.txt"),
    "recipe": ("recipe.toml", "recipe-b.toml"),
    "pooling": ("recipe.toml", "recipe-pooling.toml"),
}
# Options of which each gives another bundle.
OPTIONS = {
    "dtype": ("--dtype", "float16"),
    "method": ("--method", "magnitude"),
    "exclude": ("--exclude", "*query"),
    "seed": ("--seed", "7"),
    "evaluated": ("--evaluation-tokens", "4096"),
}
if importlib.util.find_spec("tensorrt_rtx"):
    OPTIONS["engines"] = ("--backend", "tensorrt-rtx")
_OUTPUTS = "outputs = ["
_EMBEDDING = '{ name = "sentence_embedding", dtype = "float", axes = ["batch", "hidden"] }'
_POOLED = '\n[embedding]\npooling = "mean"\nnormalize = true\n'


@dataclass(frozen=True, slots=True)
class Sound:
    """What an undisturbed build of some inputs gives."""

    code: int
    facts: dict[str, str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one try: in words, where it was struck, and what is wrong, if anything is."""

    fault: str
    number: int
    outcome: str
    problems: tuple[str, ...] = ()
    hit: str = ""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a resumed run wrote its manifest, in seconds since it began; its end is the last."""

    written: tuple[float, ...]

    @property
    def work(self) -> tuple[float, float]:
        """Begin and end of what it did: the last two times."""
        return ((0.0, *self.written)[-2], self.written[-1])


def write_world(folder: Path) -> None:
    """Everything that a room is filled with: two models of one shape, texts and recipes."""
    from prox24_deploy.config.recipe import shipped_recipes

    folder.mkdir(parents=True)
    write_directory(folder / "model", "bert", num_hidden_layers=1)
    shutil.copytree(folder / "model", folder / "model-b")
    torch.manual_seed(1)
    tensors = {
        name: tensor + 0.1 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(folder / "model" / WEIGHTS).items()
    }
    save_file(tensors, folder / "model-b" / WEIGHTS, {"format": "pt"})
    for i, name in enumerate(("text.txt", "held-out.txt", "text-b.txt", "held-out-b.txt")):
        write_prose(folder / name, seed=i)
    recipe = shipped_recipes()["bert"].replace(_OUTPUTS, f"outputs = [{_EMBEDDING},", 1) + _POOLED
    others = {
        "recipe": recipe,
        # Another layer is pruned, and other graphs and figures come of the same weights.
        "recipe-b": recipe.replace('    "output.dense",\n', "", 1),
        "recipe-pooling": recipe.replace('"mean"', '"cls"'),
    }
    for name, text in others.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    config = json.loads((folder / "model" / "config.json").read_bytes())
    changed = json.dumps(config | {"hidden_act": "relu"})
    (folder / "config-b.json").write_text(changed, encoding="utf-8")
    words = (folder / "model" / "tokenizer.json").read_text(encoding="utf-8")
    swapped = words.replace('"add_prefix_space":false', '"add_prefix_space":true')
    swapped = swapped.replace('"add_prefix_space": false', '"add_prefix_space": true')
    (folder / "tokenizer-b.json").write_text(swapped, encoding="utf-8")


@dataclass(slots=True)
class Room:
    """One folder to try faults in; `world` is what it is filled with, `sound` what is known."""

    folder: Path
    world: Path
    sound: dict[str, Sound]
    stages: tuple[str, ...] = ()
    seed: int = 0
    timelines: dict[str, Timeline] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The bundle."""
        return self.folder / "out"

    @property
    def model(self) -> Path:
        """MODEL_DIR."""
        return self.folder / "model"

    @property
    def snapshots(self) -> Path:
        """Unfinished bundles by the stage that comes next."""
        return self.folder.with_name(f"{self.folder.name}-snapshots")

    @property
    def references(self) -> Path:
        """The bundles of the undisturbed builds, by name."""
        return self.world.with_name("references")

    def reset(self) -> None:
        """Sound inputs, and no bundle."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.world, self.folder)
        (self.folder / "tmp").mkdir()

    def build(self, *options: str) -> list[str]:
        """The line that builds the bundle."""
        return [*self._line("build", options), *_REST, *options]

    def prune(self) -> list[str]:
        """The line that only prunes, with the inputs and options of `build`."""
        return self._line("prune")

    def _line(self, command: str, options: Sequence[str] = ()) -> list[str]:
        """A command on the inputs of this room but those that `options` give."""
        inputs = {
            "--calibration": "text.txt",
            "--evaluation": "held-out.txt",
            "--recipe": "recipe.toml",
        }
        given = [word for pair in inputs.items() if pair[0] not in options for word in pair]
        return [command, "model", "-o", "out", *given, *_PRUNE]

    def begin(
        self,
        line: Sequence[str | Path],
        *,
        prepare: Prepare | None = None,
        fresh: bool = False,
        log: str = "log",
    ) -> Run:
        """Start a command line in this room."""

        def enter() -> None:
            os.chdir(self.folder)
            os.environ["TMPDIR"] = str(self.folder / "tmp")
            tempfile.tempdir = None
            if prepare:
                prepare()

        return begin(line, self.folder / log, prepare=enter, fresh=fresh)

    def run(
        self, line: Sequence[str | Path], *, prepare: Prepare | None = None, fresh: bool = False
    ) -> Ended:
        """Run a command line in this room to its end."""
        return self.begin(line, prepare=prepare, fresh=fresh).wait()

    def facts(self) -> dict[str, str]:
        """Those of the bundle, whatever the name of this room."""
        path = str(self.folder)
        return {name: text.replace(path, "ROOM") for name, text in facts(self.out).items()}

    def measure(self, *options: str) -> Sound:
        """An undisturbed build of what lies here."""
        ended = self.run(self.build(*options))
        if ended.code not in {0, 3, 5}:
            raise RuntimeError(f"the undisturbed build ended with {ended.code}: {ended.text}")
        return Sound(ended.code, self.facts(), ended.seconds)

    def completed(self, sound: Sound, *options: str, fresh: bool = False) -> list[str]:
        """Build to the end; what is not as after the undisturbed build."""
        before = hashes(self.model)
        ended = self.run(self.build(*options), fresh=fresh)
        problems = [] if hashes(self.model) == before else ["MODEL_DIR was changed"]
        if ended.code != sound.code:
            return [*problems, f"the next run ended with {ended.code}: {ended.text[-2000:]}"]
        return problems + self.unlike(sound)

    def unlike(self, sound: Sound) -> list[str]:
        """What of a finished bundle is not as expected."""
        names = differences(self.facts(), sound.facts)
        problems = [f"differs: {', '.join(names)}"] if names else []
        problems += [f"left behind: {path}" for path in leftovers(self.out)]
        return problems + self.unverified()

    def unverified(self) -> list[str]:
        """What `verify` says against the bundle."""
        ended = self.run(["verify", "out"])
        return [] if ended.code == 0 else [f"verify ended with {ended.code}: {ended.sentence}"]

    def stage_of(self, number: int) -> str:
        """The stage that a try strikes; all are met equally often, in an order of the seed."""
        every = (*self.stages, REPORT)
        order = Random(self.seed).sample(every, len(every))
        return order[number % len(order)]

    def next_stage(self) -> str:
        """The first stage that the bundle has not finished."""
        done = finished_stages(self.out)
        return next((stage for stage in self.stages if stage not in done), REPORT)

    def restore(self, stage: str) -> None:
        """A bundle that was killed before `stage`, or a sealed one."""
        if not self.timelines:
            self._take_snapshots()
        self.reset()
        if stage != self.stages[0]:
            shutil.copytree(self.snapshots / stage, self.out)

    def restore_pruned(self, stage: str) -> None:
        """The same, and `prune` was the last command, on which single stages can go on."""
        self.restore(stage)
        ended = self.run(self.prune())
        if ended.code:
            raise RuntimeError(f"prune ended with {ended.code}: {ended.text}")

    def _take_snapshots(self) -> None:
        """Build stage by stage, killed as soon as each is entered, and learn how long it takes."""
        self.reset()
        shutil.rmtree(self.snapshots, ignore_errors=True)
        for stage in (*self.stages, REPORT):
            if stage != self.stages[0]:
                shutil.copytree(self.out, self.snapshots / stage)
            self.timelines[stage] = self._until_finished(stage)
        shutil.copytree(self.out, self.snapshots / SEALED)
        if unlike := self.unlike(self.sound["a"]):
            raise RuntimeError(f"a build in pieces is not as the undisturbed one: {unlike}")

    def _until_finished(self, stage: str) -> Timeline:
        run = self.begin(self.build())
        watch = ManifestWatch(self.out)
        while run.poll() is None and (stage == REPORT or stage not in finished_stages(self.out)):
            watch.look()
            time.sleep(0.001)
        watch.look()
        if stage != REPORT:
            run.strike(signal.SIGKILL)
        run.wait()
        return Timeline(tuple(moment - run.began for moment in watch.moments))


class ManifestWatch:
    """Sees that a manifest was written, by which a run tells how far it is."""

    def __init__(self, bundle: Path) -> None:
        self._path = bundle / "manifest.json"
        self._last = self._stamp()
        self.moments: list[float] = []

    def look(self) -> int:
        """How often it was written since the watch began, as far as was seen."""
        stamp = self._stamp()
        if stamp != self._last:
            self._last = stamp
            self.moments.append(time.monotonic())
        return len(self.moments)

    def _stamp(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns
