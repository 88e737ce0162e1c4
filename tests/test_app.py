"""The page in the browser: what its buttons do, as a browser asks for it, and against the command line."""

import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image, ImageSequence
from tiny_parts import save_pipeline

from xdlm_image.app import asked as asking
from xdlm_image.app.asked import Asked, enlarged, picture_and_mask
from xdlm_image.app.page import Work, page, what_suits
from xdlm_image.app.serving import refuse_unheard
from xdlm_image.cli import main
from xdlm_image.drawing.opening import open_pipeline


def opened(folder):
    return str(folder), open_pipeline(folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "small": opened(save_pipeline(folder / "p")),
        "plain": opened(save_pipeline(folder / "q", num_classes=None)),
        "many": opened(save_pipeline(folder / "r", num_classes=20)),
    }


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
    call = Asked.of(models, *values(**changes))
    done = []
    return call, call.draw(lambda at, unit: done.append(at)), done


def picture(models, colour=(200, 200, 200, 255)):
    height, width = models["small"][1].image_size
    return Image.new("RGBA", (3 * width, 3 * height), colour)


def painted_left(background):
    layer = Image.new("RGBA", background.size, (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, 0, background.width // 2, background.height))
    return {"background": background, "layers": [layer], "composite": background}


@pytest.mark.parametrize(
    ("changes", "count", "evaluations"),
    [
        ({}, 4, 3),
        ({"classes": [], "early": 1, "late": 2, "grid": "cosine", "sampler": "psi"}, 6, 5),
        ({"name": "plain", "classes": []}, 2, 3),
        ({"name": "many", "classes": [], "per_class": 16, "steps": 1}, 64, 1),
        ({"editor": "painted"}, 4, 3),
        ({"editor": "bare", "strength": 0.5}, 4, 3),
    ],
)
def test_the_command_that_is_told_draws_the_same_images(models, tmp_path, monkeypatch, changes, count, evaluations):
    if "editor" in changes:
        editor = painted_left(picture(models))
        changes = changes | {"editor": editor if changes["editor"] == "painted" else editor | {"layers": []}}
    call, images, done = drawn(models, **changes)
    steps = changes.get("steps", 3)
    assert done == [(i + 1, steps) for i in range(steps)]
    monkeypatch.chdir(tmp_path)
    call.save_start(tmp_path)
    assert main([*shlex.split(call.command())[1:], "--images_dir", "drawn"]) == 0
    files = sorted((tmp_path / "drawn").glob("*/*.png"), key=lambda path: path.stem)
    assert len(files) == len(images) == len(call.captions()) == count
    for file, image in zip(files, images):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(image).astype(int)).max() <= 1
    assert call.cost().startswith(f"{count} images, {evaluations} evaluations")


def test_what_is_not_painted_over_is_kept(models):
    editor = painted_left(picture(models))
    pixels = np.asarray(drawn(models, editor=editor)[1][0].convert("L"))
    half = pixels.shape[1] // 2
    assert (pixels[:, half:] == 200).all() and not (pixels[:, :half] == 200).all()
    pixels = np.asarray(drawn(models, editor=editor | {"layers": []})[1][0].convert("L"))
    assert not (pixels[:, half:] == 200).all()


def test_a_transparent_picture_lies_on_white(models):
    image, mask = picture_and_mask({"background": picture(models, (0, 0, 0, 51)), "layers": [], "composite": None})
    assert image.getpixel((0, 0)) == (204, 204, 204) and mask is None
    assert picture_and_mask({"background": None, "layers": [], "composite": None}) == (None, None)


@pytest.mark.parametrize("colour", [(0, 0, 0, 0), (255, 255, 255, 255)])
def test_an_empty_picture_is_refused(models, colour):
    with pytest.raises(ValueError, match="the picture to begin at is empty"):
        drawn(models, editor=painted_left(picture(models, colour)))


def test_a_picture_of_too_many_pixels_is_refused(models, monkeypatch):
    monkeypatch.setattr(asking.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="upload a smaller one"):
        drawn(models, editor=painted_left(picture(models)))


def test_small_images_are_enlarged_for_the_brush():
    assert enlarged(Image.new("L", (28, 28))).size == (448, 448)
    assert enlarged(Image.new("L", (512, 512))).size == (512, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_class": 16, "classes": [0, 1, 2, 0, 1]}, "80 images: at most 64"),
        ({"seed": 1 << 14}, "seed=16384"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"seed": None}, "seed=None"),
        ({"seed": float("inf")}, "seed=inf"),
        ({"hot": 0.0, "cold": 0.0}, "temperature=0.0"),
        ({"name": "plain", "classes": [], "late": 2}, "an unconditional model"),
    ],
)
def test_what_cannot_be_drawn_is_refused(models, changes, message):
    with pytest.raises(ValueError, match=message):
        drawn(models, **changes)


def test_the_page_shows_what_a_pipeline_has(models):
    classes, guidance, _ = what_suits(models["plain"][1])
    assert classes["choices"] == [] and not classes["visible"] and not guidance["visible"]
    twice = open_pipeline(models["small"][0], torch.device("cpu"))
    twice.register_to_config(id2label={0: "crane, bird", 1: "crane, machine", 2: "cat, pet"})
    classes, guidance, _ = what_suits(twice)
    assert [name for name, _ in classes["choices"]] == ["crane, bird", "crane, machine", "cat"] and guidance["visible"]


def test_a_browser_gets_images_a_film_and_errors(models, tmp_path):
    served = page(models, Work())
    _, url, _ = served.launch(prevent_thread_lock=True, quiet=True, share=False)
    try:
        client = Client(url, verbose=False, download_files=tmp_path)
        call, expected, _ = drawn(models)
        given = values(editor={"background": None, "layers": [], "composite": None})
        for name, filmed in (("/draw", False), ("/film", True)):
            images, cost, command, _, film = client.predict(*given, api_name=name)
            assert [entry["caption"] for entry in images] == call.captions()
            assert (cost, command) == (call.cost(), call.command())
            for entry, image in zip(images, expected, strict=True):
                assert entry["image"].endswith(".png")
                shown = Image.open(entry["image"]).convert("RGB")
                assert (np.asarray(shown) == np.asarray(image.convert("RGB"))).all()
            assert film["visible"] == filmed
        assert len([*ImageSequence.Iterator(Image.open(film["value"]))]) == 4  # three steps, and what they begin with
        background = picture(models)
        files = {"background": background, "layers": painted_left(background)["layers"][0]}
        for name, image in files.items():
            image.save(tmp_path / f"{name}.png")
            files[name] = handle_file(tmp_path / f"{name}.png")
        editor = {**files, "layers": [files["layers"]], "composite": None}
        images, *_, command, start, _ = client.predict(*values(per_class=2.0, editor=editor), api_name="/draw")
        pixels = np.asarray(Image.open(images[0]["image"]).convert("L"))
        assert (pixels[:, pixels.shape[1] // 2 :] == 200).all() and "--mask MASK.png" in command
        assert [Path(path).name for path in start["value"]] == ["PICTURE.png", "MASK.png"] and start["visible"]
        with pytest.raises(Exception, match="seed=1.5"):
            client.predict(*values(seed=1.5), api_name="/draw")
        request = urllib.request.Request(
            f"{url}gradio_api/run/draw", b'{"data": []}', {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="404"):  # beside the queue, calls would meet
            urllib.request.urlopen(request)
    finally:
        served.close(verbose=False)


def test_a_page_that_is_closed_ends_what_is_drawn(models):
    work = Work()
    pipeline = open_pipeline(models["small"][0], torch.device("cpu"))
    page({"small": ("", pipeline)}, work)
    began, ended = threading.Event(), []

    def draw():
        with work:
            try:
                Asked.of({"small": ("", pipeline)}, *values(steps=64)).draw(lambda at, unit: wait_for_stop())
            except RuntimeError as error:
                ended.append(str(error))

    def wait_for_stop():
        began.set()
        threading.Event().wait(0.02)

    thread = threading.Thread(target=draw)
    thread.start()
    assert began.wait(30)
    work.stop()
    assert ended == ["the page is being closed"]
    thread.join()


@pytest.mark.parametrize(("number", "status", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_the_command_ends_when_it_is_told_to(models, number, status, word):
    command = [sys.executable, "-m", "xdlm_image.cli", "app", "--pipelines", f"{{small: {models['small'][0]}}}"]

    def hear() -> None:  # shells let commands behind an & ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear)
    try:
        url = running.stdout.readline().split()[0]
        assert b"xdlm_image" in urllib.request.urlopen(url).read()
        running.send_signal(getattr(signal, number))
        _, told = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == status and f"xdlm-image app: {word}" in told


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["app", "--pipelines", "{mine: nowhere}", "--port", str(port)]) == 2
    assert f"port={port}: cannot be listened at" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["nonsense.invalid", "http://127.0.0.1", "::1"])
def test_hosts_that_are_none_are_refused(host):
    with pytest.raises(ValueError, match="no IPv4 address"):
        refuse_unheard(host, None)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'xdlm-image[app]'" in capsys.readouterr().err


def test_without_a_checkout_the_error_names_the_option_there_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("xdlm_image.shipped_models.__file__", str(tmp_path / "a" / "b.py"))
    assert main(["app"]) == 2
    assert "--pipelines '{mine: " in capsys.readouterr().err


def test_an_impossible_port_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["app", "--port", "70000"])
    assert "port=70000" in capsys.readouterr().err
