"""Folders and .npz of other people's samples: what comes out, and what is refused by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_untrusted_input import png_that_claims

from xdlm_image.drawing.given_images import NO_CLASS, GivenImages
from xdlm_image.drawing.pictures import class_folders

CLASSES = ["ant", "bee", "cat"]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def gather(given: GivenImages, batch_size: int = 2) -> torch.Tensor:
    batches = list(given.batches(batch_size))
    assert [batch.start for batch in batches] == list(range(0, len(given), batch_size))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(given.labels))
    return torch.cat([batch.images for batch in batches])


def expected(pixels: np.ndarray = PIXELS) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_as_adm_writes_it(save, tmp_path):
    save(tmp_path / "samples.npz", PIXELS, np.array([2, 0, 1, 1, 0]))
    given = GivenImages(tmp_path / "samples.npz", 3, 8, CLASSES)
    assert torch.equal(gather(given), expected()) and given.labels.tolist() == [2, 0, 1, 1, 0] and given.notes == []
    assert isinstance(given._array, np.memmap) == (save is np.savez)
    save(tmp_path / "bare.npz", PIXELS)
    assert (GivenImages(tmp_path / "bare.npz", 3, 8, CLASSES).labels == NO_CLASS).all()
    save(tmp_path / "other.npz", PIXELS[::-1].copy())
    prints = {GivenImages(tmp_path / f"{name}.npz", 3, 8, CLASSES).fingerprint for name in ("bare", "other")}
    assert len(prints) == 2


def test_the_fingerprint_is_of_the_content(tmp_path):
    def of_labels(*labels: int) -> str:
        np.savez(tmp_path / "a.npz", PIXELS, np.array(labels))
        return GivenImages(tmp_path / "a.npz", 3, 8, CLASSES).fingerprint

    assert of_labels(0, 1, 2, 0, 1) == of_labels(0, 1, 2, 0, 1) != of_labels(0, 1, 2, 0, 2)
    folder, prints = tmp_path / "folder", []
    folder.mkdir()
    for pixels in (PIXELS, PIXELS, 255 - PIXELS):  # uncompressed: the sizes of the files are the same
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i}.bmp")
        prints.append(GivenImages(folder, 3, 8, CLASSES).fingerprint)
    (folder / "0.bmp").rename(folder / "9.bmp")
    prints.append(GivenImages(folder, 3, 8, CLASSES).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_that_does_not_fit_its_checksums_is_refused(save, tmp_path):
    save(tmp_path / "a.npz", PIXELS, np.array([2, 0, 1, 1, 0]))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[500] ^= 1  # in the pixels
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz.*cannot be read as ADM's \.npz"):
        GivenImages(tmp_path / "a.npz", 3, 8, CLASSES)


def test_folders_with_and_without_classes(tmp_path):
    for i, name in enumerate(["ant", "bee", "cat", "bee", "strange"]):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(PIXELS[i]).save(tmp_path / name / f"{i}.png")
    given = GivenImages(tmp_path, 3, 8, CLASSES)
    assert given.labels.tolist() == [0, 1, 2, 1, NO_CLASS]  # in the order of the files' names
    assert torch.equal(gather(given), expected())
    for hidden in (".0000001.77.partial.png", "._0.png"):  # of a killed run; of macOS
        (tmp_path / "ant" / hidden).write_bytes(b"half")
    assert len(GivenImages(tmp_path, 3, 8, CLASSES)) == 5
    (note,) = given.notes
    assert "1 of its folders are no class of the reference (strange): no class accuracy is given" in note
    for i in range(6):
        (tmp_path / f"odd{i}").mkdir()
        Image.fromarray(PIXELS[0]).save(tmp_path / f"odd{i}" / "0.png")
    (note,) = GivenImages(tmp_path, 3, 8, CLASSES).notes
    assert "7 of its folders are no class of the reference (odd0, odd1, odd2, odd3, odd4, ...)" in note
    for i in range(6):
        shutil.rmtree(tmp_path / f"odd{i}")
    (tmp_path / "strange").rename(tmp_path / "cat_")
    assert GivenImages(tmp_path, 3, 8, ["ant", "bee", "cat", "cat*"]).labels.tolist() == [0, 1, 2, 1, 3]
    assert class_folders(["T-shirt/top", "a:b", "a/b", "n01440764", "bee, wasp", ".."]) == [
        "T-shirt_top", "a_b_1", "a_b_2", "n01440764", "bee, wasp", "_",
    ]  # fmt: skip
    assert len({*class_folders(["a", "a", "a_1"])}) == 3
    Image.fromarray(PIXELS[0]).save(tmp_path / "ant" / "9.jpg")
    (note,) = GivenImages(tmp_path, 3, 8, [*CLASSES, "cat_"]).notes
    assert "1 of 6 files are JPEG" in note
    for name in ("ant/10.heic", "ant/11.HEIC", "bee/12.gif", "about.json", "ant/.DS_Store"):
        (tmp_path / name).write_bytes(b"")
    kinds, _ = GivenImages(tmp_path, 3, 8, [*CLASSES, "cat_"]).notes
    assert "files of other kinds in the folder are not taken (.heic 2, .gif 1); .jpg .jpeg .png" in kinds
    (alone := tmp_path / "alone").mkdir()
    Image.fromarray(PIXELS[0]).save(alone / "0.png")
    assert GivenImages(tmp_path, 3, None, []).image_size == 8
    with pytest.raises(ValueError, match="images=.*alone'.*a single image; distances need at least 2"):
        GivenImages(alone, 3, 8, CLASSES)


def test_grey_and_colour_meet_only_where_nothing_is_lost(tmp_path):
    np.savez(tmp_path / "grey.npz", PIXELS[..., :1])
    np.savez(tmp_path / "equal.npz", PIXELS[..., :1].repeat(3, 3))
    np.savez(tmp_path / "colour.npz", PIXELS)
    assert torch.equal(
        gather(GivenImages(tmp_path / "grey.npz", 3, 8, CLASSES)), expected(PIXELS[..., :1].repeat(3, 3))
    )
    assert torch.equal(gather(GivenImages(tmp_path / "equal.npz", 1, 8, CLASSES)), expected(PIXELS[..., :1]))
    with pytest.raises(ValueError, match=r"colour\.npz is in colour, the reference grey"):
        gather(GivenImages(tmp_path / "colour.npz", 1, 8, CLASSES))


def test_files_are_grey_where_they_are_not_only_where_grey_is_wanted(tmp_path):
    for kind, pixels in (("colour", PIXELS), ("grey", PIXELS[..., 0]), ("equal", PIXELS[..., :1].repeat(3, 3))):
        (tmp_path / kind).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / kind / f"{i}.png")
    for kind in ("grey", "equal"):
        assert torch.equal(gather(GivenImages(tmp_path / kind, 1, 8, CLASSES)), expected(PIXELS[..., :1]))
    with pytest.raises(ValueError, match=r"0\.png is in colour, the reference grey"):
        GivenImages(tmp_path / "colour", 1, 8, CLASSES)


def test_folders_are_walked_as_data_sets_are(tmp_path):
    """Through links, past what is hidden; and images beside class folders are told of."""
    for i, place in enumerate(("ant", "elsewhere", "ant/.thumbs", "__MACOSX")):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(PIXELS[i]).save(tmp_path / place / f"{i}.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "ant").rename(tmp_path / "set" / "ant")
    (tmp_path / "__MACOSX").rename(tmp_path / "set" / "__MACOSX")
    (tmp_path / "set" / "bee").symlink_to(tmp_path / "elsewhere")
    given = GivenImages(tmp_path / "set", 3, 8, CLASSES)
    assert given.labels.tolist() == [0, 1] and given.notes == []
    Image.fromarray(PIXELS[4]).save(tmp_path / "set" / "4.png")
    (note,) = GivenImages(tmp_path / "set", 3, 8, CLASSES).notes
    assert "1 of its images lie beside the class folders: no class accuracy is given" in note
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="images: the link .*loop leads to .*above itself"):
        GivenImages(tmp_path / "set", 3, 8, CLASSES)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    def refused(match: str, *arrays, error=ValueError, **named):
        np.savez(tmp_path / "a.npz", *arrays, **named)
        with pytest.raises(error, match=match):
            gather(GivenImages(tmp_path / "a.npz", 3, 8, CLASSES))

    refused(r"8 x 6 pixels, the reference 8 x 8; samples are never resized here: take a reference of", PIXELS[:, :, :6])
    refused(r"arr_0 is float32 \(5, 8, 8, 3\); expected uint8", PIXELS.astype(np.float32))
    refused(r"arr_0 is uint8 \(5, 3, 8, 8\)", PIXELS.transpose(0, 3, 1, 2).copy())
    refused("holds samples.npy and no arr_0", samples=PIXELS)
    refused("labels from 0 to 3, the reference has 3 classes", PIXELS, np.array([0, 1, 2, 3, 0]))
    refused(r"arr_1 is int64 \(4,\), no labels", PIXELS, np.array([0, 1, 2, 0]))
    refused("cannot be read as ADM's .npz", np.array([{"a": 1}], dtype=object))
    whole = tmp_path / "a.npz"
    np.savez(whole, PIXELS)
    whole.write_bytes(whole.read_bytes()[:-60])
    with pytest.raises(ValueError, match="cannot be read as ADM's .npz"):
        GivenImages(whole, 3, 8, CLASSES)
    (tmp_path / "small").mkdir()
    Image.fromarray(PIXELS[0, :6]).save(tmp_path / "small" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 6 x 8 pixels, the reference 8 x 8"):
        GivenImages(tmp_path / "small", 3, 8, CLASSES)  # at once, not when it is measured
    Image.fromarray(PIXELS[0]).save(tmp_path / "small" / "0.png")
    with pytest.raises(ValueError, match=r"a\.png has 6 x 8 pixels, the reference 8 x 8"):
        GivenImages(tmp_path / "small", 3, 8, CLASSES)  # and not the first file alone
    for path in (tmp_path / "none", tmp_path / "empty"):
        Path(tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="no such folder or .npz|no image file"):
            GivenImages(path, 3, 8, CLASSES)
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        gather(GivenImages(tmp_path / "empty", 3, 8, CLASSES))
    (tmp_path / "empty" / "broken.png").unlink()
    (tmp_path / "empty" / "0.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match=r"the link '.*0\.png' leads nowhere"):
        GivenImages(tmp_path / "empty", 3, 8, CLASSES)
    (tmp_path / "empty" / "0.png").unlink()
    Image.fromarray(PIXELS[0]).save(tmp_path / "empty" / "0.png")
    png_that_claims(tmp_path / "empty" / "bomb.png", 60_000, 60_000)
    with pytest.raises(ValueError, match=r"bomb\.png.*decompression bomb"):
        gather(GivenImages(tmp_path / "empty", 3, 8, CLASSES))
