"""The pass over all files before expensive work."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xdlm_image.data import image_check
from xdlm_image.data.image_check import check_images
from xdlm_image.data.images import ImageSet, open_images, read_image
from xdlm_image.recipes import DataOptions


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Twelve JPEG and three PNG files for training, and a home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    random = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 1)):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        for i in range(number):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / "a" / f"{i:02d}.jpg")
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / "images" / "train" / "a" / f"{i:02d}.png")
    return tmp_path / "images"


def training(root: Path) -> ImageSet:
    return open_images(DataOptions(name="folder", root=str(root), image_size=8, channels=3), "train")


def test_whole_files_pass_once(root, monkeypatch):
    check_images(training(root), 2)

    def again(path):
        raise RuntimeError("checked again")

    monkeypatch.setattr(image_check, "check_image", again)
    check_images(training(root))
    shutil.copytree(root, root.parent / "copy")
    with pytest.raises(RuntimeError, match="checked again"):
        check_images(training(root.parent / "copy"))


def test_images_that_are_enlarged_are_told_of(root, capsys):
    check_images(training(root))
    assert "enlarged" not in capsys.readouterr().out
    for i in range(2):
        Image.new("RGB", (30, 20 + i)).save(root / "val" / "a" / f"small{i}.png")
    check_images(open_images(DataOptions(name="folder", root=str(root), image_size=24, channels=3), "test"))
    said = "note: 2 of 3 images of test are smaller than 24 x 24 pixels, down to 20, and are enlarged"
    assert said in capsys.readouterr().out


def test_some_of_the_files_are_checked_alone(root):
    broken = root / "train" / "a" / "02.png"
    broken.write_bytes(b"nothing")
    images = training(root)
    last = images.paths.index(str(broken))
    check_images(images, places=[i for i in range(15) if i != last])
    check_images(images, places=[])
    for places in ([0, last], None):
        with pytest.raises(ValueError, match="1 of (2|15) files of train are broken"):
            check_images(images, places=places)


def test_files_that_were_written_since_are_checked_again(root):
    check_images(training(root))
    file = root / "train" / "a" / "00.png"
    file.write_bytes(bytes(file.stat().st_size))  # as large as before
    with pytest.raises(ValueError, match="1 of 15 files of train are broken"):
        check_images(training(root))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_broken_files_are_told_at_once(root, num_workers):
    images = root / "train" / "a"
    for i in range(11):
        whole = (images / f"{i:02d}.jpg").read_bytes()
        (images / f"{i:02d}.jpg").write_bytes(whole[: len(whole) * 9 // 10])  # the header is whole
    (images / "00.png").write_bytes((images / "00.png").read_bytes()[:-40])
    (images / "01.png").write_text("no picture")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(images / "floats.tiff")
    with pytest.raises(ValueError, match=r"14 of 16 files of train are broken") as caught:
        check_images(training(root), num_workers)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 4 more"
    assert "00.jpg" in lines[1] and "replace it" in lines[1]
    with pytest.raises(ValueError, match="14 of 16"):  # a failure is not remembered as a success
        check_images(training(root), num_workers)


def test_what_passes_can_be_read_and_what_fails_cannot(root):
    images = root / "train" / "a"
    whole = (images / "00.jpg").read_bytes()
    for part in (0.2, 0.6, 0.95, 1.0):
        (images / "00.jpg").write_bytes(whole[: int(len(whole) * part)])
        try:
            read_image(images / "00.jpg", 3)
        except ValueError:
            with pytest.raises(ValueError, match="1 of 15"):
                check_images(training(root))
        else:
            assert part == 1
            check_images(training(root))


def test_a_home_that_cannot_be_written_is_said_and_passes(root, capfd):
    (root.parent / "home").write_text("not a folder")
    check_images(training(root))
    assert "cannot be written" in "".join(capfd.readouterr())


def test_a_dangling_link_is_named_among_the_broken(root):
    (root / "train" / "a" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"1 of 16 files of train are broken:\n.*gone\.png"):
        check_images(training(root))
