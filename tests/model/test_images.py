"""Images from folders: order, labels, batches as the processor makes them, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prox24_deploy.errors import CalibrationError
from prox24_deploy.model.images import Images, make_image_samples, read_images

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
