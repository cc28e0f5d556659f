"""Images from folders: order, labels, batches as the processor makes them, and bad input."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prox24_deploy.config.recipe import read_recipe
from prox24_deploy.core.errors import BackendMissingError, CalibrationError, ModelDirError
from prox24_deploy.data.images import Images, make_image_samples, pixel_sizes, read_images
from prox24_deploy.data.modality import fitted_sizes
from prox24_deploy.model.processors import load_image_processor

LABELS = {"cat": 0, "dog": 1}


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Small images of random colours, in as many sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for seed, label in enumerate(LABELS):
        write_images(tmp_path / "images" / label, 12, seed)
    (tmp_path / "images" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("processor")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True)


def test_a_fifth_is_held_out_and_the_order_is_that_of_the_seed(labelled: Path) -> None:
    calibration, held_out = read_images([labelled], [], 0)
    assert (len(calibration.files), len(held_out.files)) == (19, 5)
    assert not set(calibration.files) & set(held_out.files)
    assert (calibration.kind, held_out.kind) == ("file", "split")
    assert {folder for _, folder in calibration.files} == set(LABELS)
    assert read_images([labelled], [], 0) == (calibration, held_out)
    assert read_images([labelled], [], 1) != (calibration, held_out)


def test_evaluation_images_are_used_whole(labelled: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", 17)
    calibration, held_out = read_images([labelled], [other], 0)
    assert (len(calibration.files), len(held_out.files)) == (24, 17)
    assert held_out.paths == (str(other),)
    assert {folder for _, folder in held_out.files} == {""}


def test_batches_are_what_the_processor_makes_and_labels_follow_them(
    labelled: Path, processor: object
) -> None:
    images, _ = read_images([labelled], [labelled], 0)
    samples = make_image_samples(images, processor, LABELS, limit=20)
    pixels = torch.cat([batch.inputs["pixel_values"] for batch in samples.batches])
    assert [len(batch.real) for batch in samples.batches] == [16, 4]
    assert all(bool(batch.real.all()) for batch in samples.batches)
    assert samples.source.samples == 20
    assert samples.labels is not None
    for i, (path, folder) in enumerate(images.files[:20]):
        with Image.open(path) as image:
            expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
        found = ((pixels[i] * 0.5 + 0.5) * 255).round().permute(1, 2, 0)
        torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=1)
        assert int(samples.labels[i]) == LABELS[folder]


def test_other_pixels_have_another_hash(labelled: Path, processor: object) -> None:
    images, held_out = read_images([labelled], [], 0)
    one = make_image_samples(images, processor, LABELS, limit=16)
    same = make_image_samples(images, processor, LABELS, limit=16)
    other = make_image_samples(held_out, processor, LABELS, limit=16)
    assert one.source.sha256 == same.source.sha256 != other.source.sha256


def test_folders_that_are_no_labels_give_none(tmp_path: Path, processor: object) -> None:
    write_images(tmp_path / "holiday", 16)
    images, _ = read_images([tmp_path], [tmp_path], 0)
    assert make_image_samples(images, processor, LABELS, limit=99).labels is None


def test_folders_of_which_some_are_labels_are_refused(labelled: Path, processor: object) -> None:
    write_images(labelled / "horse", 2)
    images, _ = read_images([labelled], [labelled], 0)
    message = r"Folder 'horse' of image .*horse/00\d\.png is no label of the model, but other"
    with pytest.raises(CalibrationError, match=message):
        make_image_samples(images, processor, LABELS, limit=99)


def test_images_that_are_missing_or_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="Image models have no built-in calibration data"):
        read_images([], [], 0)
    with pytest.raises(CalibrationError, match=r"Images .*nowhere is not a folder; pass a folder"):
        read_images([tmp_path / "nowhere"], [], 0)
    write_images(tmp_path / "few", 3)
    with pytest.raises(CalibrationError, match=r"few holds 3 images, expected at least 16"):
        read_images([tmp_path / "few"], [], 0)


def test_a_damaged_image_is_named(tmp_path: Path, processor: object) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n, and nothing more")
    images = Images("file", (str(tmp_path),), ((path, ""),))
    with pytest.raises(CalibrationError, match=r"Image .*broken\.png cannot be read"):
        make_image_samples(images, processor, LABELS, limit=1)


def one(path: Path) -> Images:
    return Images("file", (str(path.parent),), ((path, ""),))


def test_a_photograph_is_prepared_as_it_is_among_others(labelled: Path, processor: Any) -> None:
    images, _ = read_images([labelled], [labelled], 0)
    together = make_image_samples(images, processor, LABELS, limit=16).batches[0]
    loaded = [Image.open(path).convert("RGB") for path, _ in images.files[:16]]
    theirs = processor(images=loaded, return_tensors="pt")["pixel_values"]
    assert torch.equal(together.inputs["pixel_values"], theirs)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_file_that_says_it_is_postscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(POSTSCRIPT)
    # A stand-in for Ghostscript, without which Pillow starts nothing.
    ghostscript = tmp_path / "gs"
    ghostscript.write_text("#!/bin/sh\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    started: list[str] = []
    watched = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
    watching = True

    def note(event: str, _: object) -> None:
        if watching and event in watched:
            started.append(event)

    # A hook stays as long as the interpreter, so it is told to stop.
    sys.addaudithook(note)
    try:
        with pytest.raises(
            CalibrationError, match=r"x\.png cannot be read \(cannot identify image"
        ):
            make_image_samples(one(path), None, {}, limit=1)
        assert not started
        # Pillow of its own accord does, and the hook sees it.
        with Image.open(path) as image, pytest.raises(subprocess.CalledProcessError):
            image.load()
        assert "subprocess.Popen" in started
    finally:
        watching = False


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_the_named_formats_are_read_whatever_the_name(
    kind: str, tmp_path: Path, processor: object
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(kind))
    assert make_image_samples(one(path), processor, {}, limit=1).source.samples == 1


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "PDF", "EPS"])
def test_any_other_format_is_refused(kind: str, tmp_path: Path, processor: object) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(kind))
    with pytest.raises(CalibrationError, match=r"a\.png cannot be read \(cannot identify image fi"):
        make_image_samples(one(path), processor, {}, limit=1)


@settings(max_examples=60)
@given(
    st.sampled_from(["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.integers(0, 2000),
)
def test_damaged_images_are_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    changes: list[tuple[int, int]],
    kept: int,
) -> None:
    data = bytearray(encoded(kind))
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(bytes(data[: kept or None]))
    refusal = ""
    with warnings.catch_warnings():
        # Pillow warns of some damage that it reads over.
        warnings.simplefilter("ignore")
        try:
            make_image_samples(one(path), _to_pixels, {}, limit=1)
        except CalibrationError as error:
            refusal = str(error)
    assert not refusal or (str(path) in refusal and refusal.endswith("."))


def _to_pixels(*, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
    assert return_tensors == "pt"
    return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((13_000, 13_000), r"it has 13000 × 13000 pixels, more than the 67,108,864 that are read"),
        ((20_000, 20_000), r".* exceeds limit of .*, could be decompression bomb DOS attack"),
        ((3000, 2), r"it has 3000 × 2 pixels, more than 20 times as long as wide"),
    ],
)
def test_an_image_that_would_fill_memory_is_not_decoded(
    size: tuple[int, int], message: str, tmp_path: Path, processor: object
) -> None:
    path = tmp_path / "a.bmp"
    header = struct.pack("<IiiHHIIiiII", 40, *size, 1, 24, 0, 0, 1, 1, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    with pytest.raises(CalibrationError, match=rf"a\.bmp cannot be read \({message}"):
        make_image_samples(one(path), processor, {}, limit=1)


def test_a_part_that_claims_a_length_takes_no_memory_for_it(
    tmp_path: Path, processor: object
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (12, 10)).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") - 4
    data[at : at + 4] = (2**32 - 1).to_bytes(4, "big")
    path.write_bytes(data)
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**31, before[1]))
    try:
        assert make_image_samples(one(path), processor, {}, limit=1).source.samples == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, processor: object) -> None:
    with (tmp_path / "a.tif").open("wb") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(CalibrationError, match=r"a\.tif cannot be read \(it has 536,870,913 bytes"):
        make_image_samples(one(tmp_path / "a.tif"), processor, {}, limit=1)


def test_one_image_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Image.Image]] = []

    def prepare(*, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        assert sum(known() is not None for known in alive) == 0
        alive.extend(weakref.ref(image) for image in images)
        return _to_pixels(images=images, return_tensors=return_tensors)

    write_images(tmp_path / "in", 16)
    images, _ = read_images([tmp_path / "in"], [tmp_path / "in"], 0)
    assert make_image_samples(images, prepare, {}, limit=16).source.samples == 16
    assert len(alive) == 16


def test_what_is_no_file_is_no_image(tmp_path: Path, processor: object) -> None:
    write_images(tmp_path / "in", 16)
    (tmp_path / "in" / "folder.png").mkdir()
    assert len(read_images([tmp_path / "in"], [tmp_path / "in"], 0)[1].files) == 16
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CalibrationError, match=r"pipe\.png cannot be read \(.*it is a pipe"):
        make_image_samples(one(tmp_path / "pipe.png"), processor, {}, limit=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_mean": [0.5]}, "cannot prepare an image"),
        ({"image_mean": "a"}, "cannot prepare an image"),
        ({"image_std": [0.0, 0.0, 0.0]}, "NaN or infinite|cannot prepare"),
        ({"rescale_factor": "x"}, "cannot prepare an image"),
        ({"size": {"height": 5}}, "cannot prepare an image|size"),
    ],
)
def test_a_processor_of_wrong_values_is_named(
    wrong: dict[str, object], message: str, tmp_path: Path
) -> None:
    described = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, **wrong
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    # numpy warns where it divides by the wrong values.
    with np.errstate(all="ignore"), pytest.raises(ModelDirError, match=message) as caught:
        pixel_sizes(load_image_processor(tmp_path))
    assert "preprocessor_config.json" in str(caught.value)


def test_images_that_are_prepared_in_several_sizes_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", 17)
    images, _ = read_images([folder], [folder], 0)

    def keep(*, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 3, *images[0].size)}

    with pytest.raises(ModelDirError, match="expected one size of all; set it in preprocessor_con"):
        make_image_samples(images, keep, {}, limit=17)


def test_pillow_is_asked_for_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path, 16)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    recipe = read_recipe(Path(__file__).parents[2] / "export" / "vit.toml")
    with pytest.raises(BackendMissingError, match=r"need Pillow, .*'prox24-deploy\[images\]'$"):
        fitted_sizes(recipe, folder)
