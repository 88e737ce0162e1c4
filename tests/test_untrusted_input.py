"""Files from elsewhere: pictures that are bombs or none, recipes with tags, pipelines that name other modules."""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pipeline import make_pipe

from xdlm_image import XDLMImg2ImgPipeline, XDLMPipeline
from xdlm_image.cli import main
from xdlm_image.data.images import check_image, read_image
from xdlm_image.pipelines.init_images import preprocess
from xdlm_image.recipes.recipe_file import check_recipe_file

LIMIT = Image.MAX_IMAGE_PIXELS


def png_that_claims(path: Path, width: int, height: int) -> Path:
    """A small PNG whose header tells of width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 12_000, 60_000], ids=["just above", "Pillow warns", "Pillow refuses"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, side, capsys):
    bomb = png_that_claims(tmp_path / "bomb.png", side, side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for read in (lambda: read_image(bomb, 3), lambda: check_image(bomb)):
        with pytest.raises(ValueError, match=r"bomb\.png.*decompression bomb") as caught:
            read()
        told = [int(number) for number in "".join(c if c.isdigit() else " " for c in str(caught.value)).split()]
        assert (side in told or side * side in told) and (LIMIT in told or 2 * LIMIT in told)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_lazily_opened_bomb_is_refused_by_the_pipeline(tmp_path):
    pipe = XDLMImg2ImgPipeline.from_pipe(make_pipe(channels=3))
    with Image.open(png_that_claims(tmp_path / "bomb.png", 12_000, 12_000)) as opened:
        opened.load = lambda: pytest.fail("decoded")
        with pytest.raises(ValueError, match=rf"image has 12000 x 12000 pixels, the limit is {LIMIT}"):
            pipe(opened, 0)
        with pytest.raises(ValueError, match=r"image\[1\] has 12000 x 12000 pixels"):
            pipe([Image.new("L", (4, 4)), opened], 0)


def test_a_long_strip_is_refused_before_it_is_scaled_up():
    for strip in (Image.new("L", (1_000_000, 1)), np.zeros((1, 1_000_000, 1), np.uint8)):
        with pytest.raises(ValueError, match=r"would be scaled to 256000000 x 256 pixels"):
            preprocess(strip, 256, 256, 3)


@pytest.mark.parametrize("name", ["truncated.png", "text.png", "empty.png", "drawing.svg", "folder.png", "no.png"])
def test_files_that_are_no_pictures_are_named(tmp_path, name, capsys):
    path = tmp_path / name
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(whole)
    if name == "truncated.png":
        path.write_bytes(whole.read_bytes()[:200])
    elif name == "drawing.svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>')
    elif name == "folder.png":
        path.mkdir()
    elif name != "no.png":
        path.write_text({"text.png": "no picture", "empty.png": ""}[name])
    with pytest.raises(ValueError, match=rf"image '.*{name}' cannot be read"):
        read_image(path, 3)
    with pytest.raises(ValueError, match=rf"image '.*{name}' cannot be read"):
        check_image(path)


def test_a_truncated_picture_is_refused_by_the_pipeline(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4_000])
    pipe = XDLMImg2ImgPipeline.from_pipe(make_pipe(channels=3))
    with Image.open(tmp_path / "a.png") as opened, pytest.raises(ValueError, match="image cannot be read"):
        pipe(opened, 0)
    with pytest.raises(ValueError, match="image has 0 x 4 pixels"):
        pipe(Image.new("L", (0, 4)), 0)


# --- recipes --------------------------------------------------------------------------------------


def laughs(levels: int) -> str:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    return text + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, levels))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('codes: !!python/object/apply:os.system ["touch MARKER"]', "!!python/object/apply:os.system' in line 1"),
        ('!!python/object/apply:os.system ["touch MARKER"]', "!!python/object/apply:os.system"),
        ("codes: a\nmodel: {x: [!!python/name:os.system '']}", "!!python/name:os.system' in line 2"),
        ("!!python/object/new:os.system ['touch MARKER']: 1", "!!python/object/new"),
        ("codes: !mine 3", "tag '!mine' in line 1"),
        (laughs(9), "aliases stand for more than"),
        ("codes: &a [*a]", "alias stands inside"),
        ("codes: " + "[" * 5000 + "]" * 5000, "nested more than"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n- 2\n", "holds no options"),
        ("hello", "holds no options"),
        ("codes: [1", "is no YAML"),
        (b"\x00\x01\x02" * 9, "is no YAML"),
        (bytes(range(256)), "is no text in UTF-8"),
        ("codes: " + "x" * 1_000_001, "a recipe at most 1000000"),
    ],
    ids=range(16),
)
def test_a_hostile_recipe_is_refused_by_name_and_nothing_runs(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    raw = content if isinstance(content, bytes) else content.encode()
    Path("bad.yaml").write_bytes(raw.replace(b"MARKER", str(tmp_path / "marker").encode()))
    for option in (["--config", "bad.yaml"], ["--config=bad.yaml"]):
        with pytest.raises(SystemExit) as stop:
            main(["train", *option])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "'bad.yaml'" in error and message in error and "Traceback" not in error
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    "content",
    ["process: {class_path: trap.Popen}", "process: trap.Popen", "x: &x {class_path: trap.Popen}\nprocess: {<<: *x}",
     "<<: {process: trap.Popen}", "process.class_path: trap.Popen", "process: {k: {class_path: trap.Popen}}",
     "process: sub.yaml", "config: sub.yaml", "? [1]\n: 2"],
)  # fmt: skip
def test_a_recipe_imports_nothing_and_opens_no_other_file(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "trap.py").write_text("open('marker', 'w')\nclass Popen: pass\n")
    (tmp_path / "sub.yaml").write_text("{process: {class_path: trap.Popen}, class_path: trap.Popen}\n")
    (tmp_path / "bad.yaml").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", "bad.yaml"])
    assert stop.value.code == 2 and not Path("marker").exists() and "trap" not in sys.modules
    error = capsys.readouterr().err
    assert "Traceback" not in error and "bad.yaml" in error


def test_a_folder_is_no_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path)])
    assert f"--config '{tmp_path}' is a folder" in capsys.readouterr().err


def test_anchors_of_people_are_welcome(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &x {k: 0.1, t: 2020-01-01}\ny: {<<: *x, z: [*x, 1.5, true, null]}\n")
    check_recipe_file(tmp_path / "a.yaml")


# --- pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_pipe().save_pretrained(folder)
    return folder / "model_index.json"


@pytest.fixture
def trap(saved, tmp_path, monkeypatch):
    """Loads the pipeline with a changed index; the module `trap`, which the index may name, must not be imported."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Popen: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = saved.read_text()

    def load(text: str | None = None, **changes):
        saved.write_text(json.dumps(json.loads(whole) | changes) if text is None else text)
        try:
            return XDLMPipeline.from_pretrained(saved.parent)
        finally:
            saved.write_text(whole)
            assert "trap" not in sys.modules and not (tmp_path / "marker").exists()

    return load


@pytest.mark.parametrize("part", ["transformer", "scheduler", "vqvae"])
@pytest.mark.parametrize(
    "value",
    [["subprocess", "Popen"], ["os", "system"], ["trap", "Popen"], ["xdlm_image.cli", "main"],
     ["diffusers", "UNet2DModel"], ["trap", "VQModel"], ["trap", "XDLMScheduler"], None, [None], "trap",
     [1, 2], {"a": 1}],
    ids=str,
)  # fmt: skip
def test_other_parts_are_refused_before_they_are_imported(trap, part, value):
    with pytest.raises(ValueError, match=rf"model_index\.json: {part} is .*must be .*; nothing was imported"):
        trap(**{part: value})


def test_more_parts_and_other_classes_of_the_pipeline_are_never_imported(trap):
    assert type(trap(extra=["trap", "Popen"])) is XDLMPipeline
    assert type(trap(_class_name=["trap", "Popen"])) is XDLMPipeline
    assert type(trap(_class_name="StableDiffusionPipeline")) is XDLMPipeline


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"_class_name": "XDLMPipeline"}'])
def test_a_damaged_index_is_named(trap, text):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        trap(text)


def test_names_of_a_hostile_index(trap):
    for value in (["trap", "Popen"], "trap", {"x": "y"}, {"0": {"a": 1}}, {"99": "far"}):
        with pytest.raises(ValueError, match="id2label"):
            trap(id2label=value)
    with pytest.raises(ValueError, match="id2synset"):
        trap(id2synset={"0": "trap"})


def test_an_own_part_stands_for_a_missing_one(saved):
    whole = saved.read_text()
    pipe = make_pipe()
    saved.write_text(json.dumps(json.loads(whole) | {"scheduler": [None, None]}))
    try:
        assert XDLMPipeline.from_pretrained(saved.parent, scheduler=pipe.scheduler).scheduler is pipe.scheduler
    finally:
        saved.write_text(whole)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "a1b2c3d", "A" * 40])
def test_remote_code_needs_a_pinned_revision(revision):
    with pytest.raises(ValueError, match=f"revision={revision!r}: trust_remote_code=True runs code of 'me/tiny'"):
        XDLMPipeline.from_pretrained("me/tiny", trust_remote_code=True, revision=revision)
