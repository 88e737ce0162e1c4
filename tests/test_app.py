"""The page in the browser: what its buttons do, as a browser asks for it, and against the command line."""

import shlex
import sys

import numpy as np
import pytest
from evaluation_parts import save_pipeline
from gradio_client import Client
from PIL import Image, ImageSequence

from xdlm_image import app
from xdlm_image.cli import main
from xdlm_image.evaluation.drawing import open_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = save_pipeline(tmp_path_factory.mktemp("pipeline") / "p")
    return {"small": (str(folder), open_pipeline(folder, app.best_device("cpu")))}


def values(**changes):
    """Of the page's controls, in their order."""
    usual = {
        "name": "small",
        "classes": [2, 0],
        "per_class": 2,
        "steps": 3,
        "hot": 1,
        "cold": 0.5,
        "early": 1,
        "late": 1,
        "sampler": "as saved",
        "grid": "as saved",
        "seed": 5,
        "editor": None,
        "strength": 0.6,
    }
    assert {*changes} <= {*usual}
    return [*(usual | changes).values()]


def drawn(models, **changes):
    done = []
    images, *told = app.draw_images(models, *values(**changes), progress=lambda at, unit: done.append(at))
    return images, *told, done


@pytest.mark.parametrize("changes", [{}, {"classes": [], "early": 1, "late": 2, "grid": "cosine", "sampler": "psi"}])
def test_the_command_that_is_told_draws_the_same_images(models, tmp_path, changes, monkeypatch):
    images, captions, cost, command, done = drawn(models, **changes)
    assert done == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[1:], "--images_dir", "drawn"]) == 0
    files = sorted((tmp_path / "drawn").glob("*/*.png"), key=lambda path: path.stem)
    assert len(files) == len(images) == len(captions) == (4 if "classes" not in changes else 2 * models_classes(models))
    for file, image in zip(files, images):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(image).astype(int)).max() <= 1
    assert cost.startswith(f"{len(images)} images, {5 if changes else 3} evaluations")


def models_classes(models):
    return models["small"][1].transformer.config.num_classes


def picture(models, colour=(200, 200, 200, 255)):
    height, width = models["small"][1].image_size
    return Image.new("RGBA", (3 * width, 3 * height), colour)


def test_what_is_not_painted_over_is_kept(models):
    background = picture(models)
    layer = Image.new("RGBA", background.size, (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 0, background.width // 2, background.height))
    editor = {"background": background, "layers": [layer], "composite": background}
    images, _, _, command, _ = drawn(models, editor=editor)
    pixels = np.asarray(images[0].convert("L"))
    half = pixels.shape[1] // 2
    assert (pixels[:, half:] == 200).all() and not (pixels[:, :half] == 200).all()
    assert "--image PICTURE.png" in command and "--mask MASK.png" in command
    unpainted, *_, command, _ = drawn(models, editor=editor | {"layers": []})
    assert not (np.asarray(unpainted[0].convert("L"))[:, half:] == 200).all()
    assert "--image PICTURE.png" in command and "--mask" not in command


@pytest.mark.parametrize("background", [None, (0, 0, 0, 0)])
def test_an_empty_canvas_is_no_picture(models, background):
    canvas = background and picture(models, background)
    assert app.picture_and_mask({"background": canvas, "layers": [], "composite": None}) == (None, None)


def test_a_transparent_picture_lies_on_white(models):
    image, mask = app.picture_and_mask({"background": picture(models, (0, 0, 0, 51)), "layers": [], "composite": None})
    assert image.getpixel((0, 0)) == (204, 204, 204) and mask is None


def test_small_images_are_enlarged_for_the_brush():
    assert app.enlarged(Image.new("L", (28, 28))).size == (448, 448)
    assert app.enlarged(Image.new("L", (512, 512))).size == (512, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_class": 16, "classes": [0, 1, 2, 0, 1]}, "80 images: at most 64"),
        ({"seed": 1 << 14}, "seed=16384"),
        ({"hot": 0.0, "cold": 0.0}, "temperature=0.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(models, changes, message):
    with pytest.raises(ValueError, match=message):
        drawn(models, **changes)


def test_a_browser_gets_images_a_film_and_errors(models, tmp_path):
    served = app.page(models)
    _, url, _ = served.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False, download_files=tmp_path)
        given = values(editor={"background": None, "layers": [], "composite": None})
        images, cost, command, _ = client.predict(*given, api_name="/draw")
        assert [entry["caption"] for entry in images] == drawn(models)[1] and cost.startswith("4 images")
        for entry, image in zip(images, drawn(models)[0]):
            assert entry["image"].endswith(".png")
            assert (np.asarray(Image.open(entry["image"]).convert("RGB")) == np.asarray(image.convert("RGB"))).all()
        film = client.predict(*given, api_name="/film")
        film = film["value"] if isinstance(film, dict) else film
        assert len([*ImageSequence.Iterator(Image.open(film))]) == 4  # three steps, and what they begin with
        with pytest.raises(Exception, match="seed=16384"):
            client.predict(*values(seed=1 << 14), api_name="/draw")
    finally:
        served.close()


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'xdlm-image[app]'" in capsys.readouterr().err


def test_an_impossible_port_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["app", "--port", "70000"])
    assert "port=70000" in capsys.readouterr().err
