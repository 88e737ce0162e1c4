"""Opening real images: every kind of file a folder may hold, Fashion-MNIST, and the errors."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from xdlm_image.cli import parse
from xdlm_image.data import images as images_module
from xdlm_image.data.images import DEBIAN_FASHION_MNIST, normalise, open_images, read_image, to_uint8
from xdlm_image.recipes import DataOptions

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def folder_data(root: Path, **options) -> DataOptions:
    return DataOptions(**{"name": "folder", "root": str(root), "image_size": 8, "channels": 3} | options)


def class_folder(root: Path, name: str, number: int = 3) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(GREY // (i % 7 + 1)).save(folder / f"{i:03d}.png")
    return folder


def test_uint8_and_float_are_inverse():
    raw = torch.arange(256, dtype=torch.uint8)
    assert normalise(raw).min() == -1 and normalise(raw).max() == 1
    assert torch.equal(to_uint8(normalise(raw)), raw)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_floats_become_bytes_as_in_the_pngs_of_diffusers(tmp_path) -> None:
    """Rounded to nearest, not cut off: the rule in every protocol. Cutting off shifts FID."""
    levels = torch.arange(255, dtype=torch.float64)
    for offset, wanted in ((0.49, 0), (0.51, 1)):
        assert torch.equal(to_uint8((levels + offset) / 127.5 - 1).long(), levels.long() + wanted)
    images = 2.4 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1.2
    for i, picture in enumerate(VaeImageProcessor().postprocess(images, output_type="pil")):
        picture.save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as again:
            assert np.array_equal(np.asarray(again), to_uint8(images[i]).permute(1, 2, 0).numpy())


# ------------------------------------------------------------------------------------------------ kinds of files


def test_kinds_of_pictures_become_what_a_viewer_shows(tmp_path):
    colour = np.zeros((4, 4, 3), np.uint8) + np.array([200, 100, 50], np.uint8)

    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "cmyk.jpg", 3)).astype(int) - colour).max() <= 4

    Image.fromarray(colour).quantize(4).save(tmp_path / "palette.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "palette.png", 3)), colour)

    Image.fromarray(GREY).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.png", 1)), GREY)
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.png", 3)), np.repeat(GREY[..., None], 3, 2))
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "palette.png", 1)), np.asarray(Image.fromarray(colour).convert("L"))
    )

    alpha = np.concatenate([colour, np.full((4, 4, 1), 255, np.uint8)], -1)
    alpha[0, 0, 3] = 0
    alpha[0, 1, 3] = 128
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    seen = np.asarray(read_image(tmp_path / "alpha.png", 3))
    assert seen[0, 0].tolist() == [255, 255, 255]  # transparent is white, not the colour (nor black) beneath
    assert np.abs(seen[0, 1].astype(int) - [227, 177, 152]).max() <= 1
    assert seen[1, 1].tolist() == [200, 100, 50]

    clear = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    clear.putpalette([10, 20, 30, 40, 50, 60])
    clear.save(tmp_path / "clear.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "clear.png", 3)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png", 1)), GREY)


def test_exif_rotation_is_applied(tmp_path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, :8] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(read_image(tmp_path / "turned.png", 1))
    assert upright.shape == (16, 8)
    assert upright[:8].min() == 255 and upright[8:].max() == 0  # left is now on top


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_with_an_odd_tag_turns_the_picture_all_the_same(tmp_path, orientation):
    """The resolution, a fraction, is a word here; Pillow's own function writes EXIF anew and fails."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72!\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    plain = Image.fromarray(np.kron(np.array([[0, 90], [180, 255], [60, 120]]), np.ones((8, 8))).astype(np.uint8))
    plain.save(tmp_path / "odd.jpg", exif=exif, quality=95)
    with pytest.raises((struct.error, TypeError, ValueError)), Image.open(tmp_path / "odd.jpg") as image:
        ImageOps.exif_transpose(image)
    tag = Image.Exif()
    tag[0x0112] = orientation
    plain.save(tmp_path / "plain.jpg", exif=tag, quality=95)
    with Image.open(tmp_path / "plain.jpg") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(read_image(tmp_path / "odd.jpg", 1)), wanted)
    plain.save(tmp_path / "torn.jpg", exif=exif[:20], quality=95)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert read_image(tmp_path / "torn.jpg", 1).size == plain.size


def test_broken_pictures_are_named(tmp_path):
    folder = class_folder(tmp_path / "train", "a")
    class_folder(tmp_path / "test", "a")
    class_folder(tmp_path / "val", "a")
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "002.png").write_bytes(b"no picture at all")
    images = open_images(folder_data(tmp_path), "train")
    assert images[0][0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"001\.png.*cannot be read"):
        images[1]
    with pytest.raises(ValueError, match=r"002\.png.*UnidentifiedImageError"):
        images[2]
    with pytest.raises(IndexError, match="3 images"):
        images[3]


def test_decompression_bomb_is_an_error_that_names_file_and_reason(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png.*decompression bomb"):
        read_image(tmp_path / "bomb.png", 3)


def test_floats_and_32_bits_have_no_8_bit_meaning(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), 100_000, np.int32)).save(tmp_path / "wide.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff.*floating-point"):
        read_image(tmp_path / "float.tiff", 1)
    with pytest.raises(ValueError, match=r"wide\.tiff.*32-bit"):
        read_image(tmp_path / "wide.tiff", 1)


# ------------------------------------------------------------------------------------------------ resize and crop


def test_shorter_side_is_resized_and_the_middle_cut_out(tmp_path):
    for split in ("train", "val", "test"):
        class_folder(tmp_path / split, "a", 1)
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255
    Image.fromarray(wide).save(tmp_path / "train" / "a" / "000.png")
    raw = open_images(folder_data(tmp_path), "train").raw(0)
    assert raw.shape == (3, 8, 8) and raw.dtype == torch.uint8
    assert raw[:, :, 1:-1].min() > 230  # the white middle third


def test_random_crop_belongs_to_training_and_to_its_generator(tmp_path):
    for split in ("train", "val", "test"):
        class_folder(tmp_path / split, "a", 1)
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1))
    for split in ("train", "test"):
        Image.fromarray(ramp).save(tmp_path / split / "a" / "000.png")
    data = folder_data(tmp_path, crop="random")
    images = open_images(data, "train")
    crops = [images.raw(0, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert len({crop.numpy().tobytes() for crop in crops}) > 3
    assert torch.equal(crops[0], images.raw(0, torch.Generator().manual_seed(0)))
    test = open_images(data, "test")
    assert test.crop == "center"
    assert torch.equal(test.raw(0), test.raw(0))


# ------------------------------------------------------------------------------------------------ Fashion-MNIST


def write_idx(folder: Path, prefix: str, number: int) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (number, 28, 28), dtype=np.uint8)
    labels = (np.arange(number) % 10).astype(np.uint8)
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb", compresslevel=1) as file:
        file.write(struct.pack(">IIII", 2051, number, 28, 28) + images.tobytes())
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">II", 2049, number) + labels.tobytes())
    return images


def test_fashion_mnist_files_are_split_and_read_exactly(tmp_path):
    train, test = write_idx(tmp_path, "train", 5_020), write_idx(tmp_path, "t10k", 30)
    data = DataOptions("fashion-mnist", str(tmp_path), download=False)
    sets = {split: open_images(data, split) for split in ("train", "validation", "test")}
    assert [len(s) for s in sets.values()] == [20, 5_000, 30]
    assert np.array_equal(sets["train"].raw(19)[0].numpy(), train[19])
    assert np.array_equal(sets["validation"].raw(0)[0].numpy(), train[20])
    assert np.array_equal(sets["test"].raw(29)[0].numpy(), test[29])
    assert sets["test"][13][1] == 3 and sets["test"].class_names[3] == "Dress"
    assert len({s.fingerprint for s in sets.values()}) == 3
    larger = open_images(DataOptions("fashion-mnist", str(tmp_path), image_size=32, channels=3), "test")
    assert larger[0][0].shape == (3, 32, 32)


def test_damaged_or_missing_fashion_mnist_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Fashion-MNIST in .*data\.download"):
        open_images(DataOptions("fashion-mnist", str(tmp_path), download=False), "train")
    write_idx(tmp_path, "train", 5_020)
    write_idx(tmp_path, "t10k", 30)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        open_images(DataOptions("fashion-mnist", str(tmp_path), download=False), "test")


def test_a_root_means_a_folder_and_nothing_is_downloaded_among_images(tmp_path, monkeypatch):
    assert DataOptions().name == "fashion-mnist" and DataOptions(root="here", image_size=8).name == "folder"
    assert DataOptions("fashion-mnist", "here").name == "fashion-mnist"
    given = [f"--data.root={tmp_path}", "--data.image_size=64"]
    for verb, options in (("train-extractor", []), ("encode", ["--tokenizer=t"]), ("train-tokenizer", [])):
        named = [parse(verb, [*options, "--output_dir=o", *more]).data.name for more in ([], given)]
        assert named == ["fashion-mnist", "folder"]
    for forgotten in ({"image_size": 64}, {"channels": 3}):  # the folder, of whoever says what its images become
        with pytest.raises(ValueError, match=rf"data\.{next(iter(forgotten))}=.*Name your folder with data\.root"):
            DataOptions(**forgotten)
        assert DataOptions("fashion-mnist", **forgotten).name == "fashion-mnist"
    (tmp_path / "recipe.yaml").write_text(f"output_dir: o\ndata:\n  root: {tmp_path}\n  image_size: 64\n")
    assert parse("train-extractor", ["--config", str(tmp_path / "recipe.yaml")]).data.name == "folder"

    def downloads(*args, **options):
        raise AssertionError("downloaded")

    monkeypatch.setattr(images_module, "FashionMNIST", downloads)
    for place in (tmp_path / "flat", tmp_path / "classes" / "a", tmp_path / "splits" / "train" / "a"):
        class_folder(place.parent, place.name, 1)
    for name in ("flat", "classes", "splits"):
        with pytest.raises(ValueError, match="images of yours.*set data.name: folder"):
            open_images(DataOptions("fashion-mnist", str(tmp_path / name)), "train")
        assert not (tmp_path / name / "FashionMNIST").exists()


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_one_process_downloads_and_all_share_the_check_of_files(tmp_path, monkeypatch):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    for split in ("train", "val"):
        class_folder(tmp_path / "images" / split, "a", 5)
    for name in ("000", "001"):  # one for each process
        (tmp_path / "images" / "train" / "a" / f"{name}.png").write_text("no picture")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("downloaded-by-*")] == ["downloaded-by-0"]


RANK = """
import os, sys, time
from pathlib import Path
from xdlm_image.data import images
from xdlm_image.data.image_check import check_images
from xdlm_image.recipes import DataOptions

root = Path(sys.argv[1])

class Downloads:
    def __init__(self, folder, download):
        (root / f"downloaded-by-{os.environ['RANK']}").touch()
        time.sleep(1)
        raw = root / "fashion" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for prefix in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (raw / f"{prefix}-{kind}-ubyte").touch()

images.FashionMNIST = Downloads
folder = images._fashion_mnist_folder(DataOptions("fashion-mnist", str(root / "fashion")))
assert folder == root / "fashion" / "FashionMNIST" / "raw", folder
options = DataOptions(name="folder", root=str(root / "images"), image_size=8)
check_images(images.open_images(options, "test"))
try:
    check_images(images.open_images(options, "train"))
except ValueError as error:
    assert "2 of 5 files of train are broken" in str(error), error
else:
    raise AssertionError("broken files passed")
"""


def test_the_real_fashion_mnist():
    images = open_images(DataOptions(), "test")
    assert len(images) == 10_000 and np.bincount(images.labels).tolist() == [1_000] * 10
    image, label = images[0]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32 and (label, image.min()) == (9, -1)


def test_pictures_open_without_warnings(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "grey.png", 3)
