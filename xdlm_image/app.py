"""The verb `app`: a page in the browser on which pipelines draw, begin at a picture and paint parts of one anew.

This file owns the page and what its buttons do; gradio, of the extra `app`, serves it, and the pipelines draw.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from xdlm_image.devices import best_device
from xdlm_image.evaluation.demo import models_folder, shipped_pipelines
from xdlm_image.evaluation.drawing import class_names, open_pipeline
from xdlm_image.evaluation.grids import class_ids, grid_labels
from xdlm_image.evaluation.sampler_settings import SamplerSettings, call_arguments, check_settings, nfe, with_scheduler
from xdlm_image.evaluation.seeds import check_seed
from xdlm_image.evaluation.trace import record
from xdlm_image.evaluation.trace_pictures import MAX_IMAGES, save_gif
from xdlm_image.pipelines import XDLMImg2ImgPipeline, XDLMInpaintPipeline, XDLMPipeline
from xdlm_image.recipes import AppRecipe
from xdlm_image.recipes.sampling import Sampler, TimeGrid

AS_SAVED = "as saved"
MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE = 64, 64, 10
EASY_TO_PAINT = 448  # pixels of a side
SMALL = 64  # pixels of a side; those of smaller images are shown as squares
STYLE = ".small img {image-rendering: pixelated; object-fit: contain}"
Models = Mapping[str, tuple[str, XDLMPipeline]]  # name -> folder and pipeline


def app(recipe: AppRecipe) -> str:
    """Serve the page until it is interrupted.

    Raises:
        FileNotFoundError, ValueError: No such pipeline, or it cannot be loaded; or gradio is not installed.
        OSError: The port is taken.
    """
    _gradio()  # before anything is loaded
    device = best_device(recipe.device)
    shipped = {} if recipe.pipelines else shipped_pipelines(models_folder(None))
    folders = recipe.pipelines or {name: os.path.relpath(path) for name, path in shipped.items()}
    models = {name: (folder, open_pipeline(folder, device, f"pipelines.{name}")) for name, folder in folders.items()}
    page(models).launch(server_name=recipe.host, server_port=recipe.port, inbrowser=recipe.open_browser, css=STYLE)
    return "the page is closed"


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"gradio: not installed ({error}); pip install 'xdlm-image[app]' brings it") from error
    return gradio


def page(models: Models) -> Any:
    """The `gradio.Blocks` of the page, not served yet."""
    gr = _gradio()
    first = next((name for name, (_, of) in models.items() if 0 < of.scheduler.config.k < 1), next(iter(models)))
    of_classes, of_guidance, of_gallery = what_suits(models[first][1])
    films = tempfile.TemporaryDirectory(prefix="xdlm_image_")  # gone with the page
    samplers, grids = ([AS_SAVED, *get_args(choices)] for choices in (Sampler, TimeGrid))
    with gr.Blocks(title="xdlm_image", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Row():
            with gr.Column():
                model = gr.Dropdown([*models], value=first, label="Pipeline", visible=len(models) > 1)
                classes = gr.Dropdown(
                    **of_classes, multiselect=True, label="Classes", info="None: all, or the first ten of many."
                )
                per_class = gr.Slider(1, 16, 4, step=1, label="Images of each")
                steps = gr.Slider(1, MOST_STEPS, 8, step=1, label="Steps")
                with gr.Row():
                    hot = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature at first")
                    cold = gr.Slider(0, 2, 0.2, step=0.05, label="and at last")
                with gr.Row(**of_guidance) as guidance:
                    early = gr.Slider(1, MOST_GUIDANCE, 1, step=0.25, label="Guidance at first")
                    late = gr.Slider(1, MOST_GUIDANCE, 1, step=0.25, label="and at last")
                with gr.Row():
                    sampler = gr.Dropdown(samplers, value=AS_SAVED, label="Sampler")
                    grid = gr.Dropdown(grids, value=AS_SAVED, label="Time grid")
                seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                with gr.Accordion("Begin at a picture", open=False):
                    editor = gr.ImageEditor(
                        type="pil", format="png", layers=False, label="What is painted over is drawn anew, if anything",
                        brush=gr.Brush(colors=["#d4005c"], color_mode="fixed"),
                    )  # fmt: skip
                    take = gr.Button("Take the image chosen on the right")
                    strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength", info="How far it is noised.")
            with gr.Column():
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary")
                    show = gr.Button("Show how")
                gallery = gr.Gallery(
                    **of_gallery, label="Images", format="png", type="pil", interactive=False, columns=4, height=520
                )
                told = gr.Markdown()
                command = gr.Textbox(label="The same as a command", buttons=["copy"])
                chosen = gr.State(0)
                film = gr.Image(label="How they came about", type="filepath", format="gif", visible=False)

        def suit(name: str) -> tuple:
            return tuple(gr.update(**settings) for settings in what_suits(models[name][1]))

        def choose(event: Any) -> int:
            return int(event.index)

        def taken(images: list | None, index: int) -> dict[str, Any]:
            if not images:
                raise gr.Error("No image has been drawn yet: press Draw", print_exception=False)
            picture = enlarged(images[min(index, len(images) - 1)][0])
            return {"background": picture, "layers": [], "composite": picture}

        own_progress = gr.Progress()  # as a default, by which gradio knows who wants it

        def drawn(*values: Any, progress: Any = own_progress) -> tuple:
            try:
                images, captions, text, line = draw_images(models, *values, progress=progress)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            return list(zip(images, captions)), text, line, gr.update(visible=False), 0

        def shown(*values: Any) -> Any:
            try:
                return gr.update(value=draw_film(models, *values, folder=films.name), visible=True)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error

        given = [model, classes, per_class, steps, hot, cold, early, late, sampler, grid, seed, editor, strength]
        alone = {"concurrency_id": "pipelines", "concurrency_limit": 1}  # a pipeline does one thing at a time
        model.change(suit, model, [classes, guidance, gallery], show_progress="hidden")
        choose.__annotations__["event"] = gr.SelectData  # gradio looks there for what the event is to bring
        gallery.select(choose, None, chosen, show_progress="hidden")
        take.click(taken, [gallery, chosen], editor)
        draw.click(drawn, given, [gallery, told, command, film, chosen], api_name="draw", **alone)
        show.click(shown, given, film, api_name="film", **alone)
    return blocks


def what_suits(pipeline: XDLMPipeline) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """How the page shows classes, guidance and images of the pipeline."""
    choices = [(name, i) for i, name in enumerate(class_names(pipeline))]
    small = max(pipeline.image_size) <= SMALL
    return (
        {"choices": choices, "value": [], "visible": bool(choices)},
        {"visible": bool(choices) and pipeline.config.supports_guidance},
        {"elem_classes": ["small"] if small else [], "object_fit": "contain"},
    )


def draw_images(models: Models, *values: Any, progress: Any) -> tuple[list[Image.Image], list[str], str, str]:
    """What the button does.

    Args:
        models: Those of the page.
        *values: Of the page's controls, in their order.
        progress: Called with (steps done, steps in all).

    Returns:
        Images, the class of each, what they cost, and the command that draws them.

    Raises:
        ValueError: What the pipeline refuses, or more images than the page shows.
    """
    folder, pipeline, ids, settings, labels, seed = _asked(models, *values)
    steps = settings.num_steps

    def tell(_: XDLMPipeline, i: int, *__: Any) -> dict:
        progress((i + 1, steps), unit="steps")
        return {}

    arguments = call_arguments(pipeline, labels, range(len(labels)), seed, settings)
    images = with_scheduler(pipeline, settings)(**arguments, callback_on_step_end=tell).images
    names = class_names(pipeline)
    cost = f"{len(images)} images, {nfe(pipeline, settings)} evaluations of the network each"
    return images, [names[i] if names else "" for i in labels], cost, command_of(folder, ids, labels, seed, settings)


def draw_film(models: Models, *values: Any, folder: str) -> str:
    """A GIF in the folder of how the same images come about, the first 32 of them; arguments and errors as before."""
    _, pipeline, _, settings, labels, seed = _asked(models, *values)
    indices = range(min(len(labels), MAX_IMAGES))
    arguments = call_arguments(pipeline, labels[: len(indices)], indices, seed, settings)
    path = Path(tempfile.mkdtemp(dir=folder)) / "states.gif"
    return str(save_gif(record(with_scheduler(pipeline, settings), **arguments), path))


def _asked(
    models: Models, name: str, classes: list[int], per_class: int, steps: int, hot: float, cold: float, early: float,
    late: float, sampler: str, grid: str, seed: int, editor: dict[str, Any] | None, strength: float,
) -> tuple[str, XDLMPipeline, list[int], SamplerSettings, list[int], int]:  # fmt: skip
    """Folder, pipeline, classes, settings, the class of each image and the seed, of the controls' values, checked."""
    folder, pipeline = models[name]
    ids = classes or class_ids(pipeline, None)
    labels = grid_labels(ids, int(per_class))
    if len(labels) > MOST_IMAGES:
        raise ValueError(
            f"{len(labels)} images: at most {MOST_IMAGES} are shown; choose fewer classes, or images of each"
        )
    check_seed(seed)
    start: dict[str, Any] = {}
    image, mask = picture_and_mask(editor)
    if image is not None:
        start = {"image": image, "strength": strength} | ({} if mask is None else {"mask_image": mask})
        pipeline = (XDLMImg2ImgPipeline if mask is None else XDLMInpaintPipeline).from_pipe(pipeline)
        pipeline.set_progress_bar_config(disable=True)
    settings = SamplerSettings(
        int(steps),
        guidance_scale=early if early == late else (early, late),
        temperature=hot if hot == cold else (hot, cold),
        time_grid=None if grid == AS_SAVED else grid,
        sampler=None if sampler == AS_SAVED else sampler,
        start=start,
    )
    check_settings(pipeline, settings)
    return folder, pipeline, ids, settings, labels, seed


def picture_and_mask(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in the editor, RGB on white, and white where it was painted over; None where there is none."""
    if editor is None or editor["background"] is None:
        return None, None
    picture = editor["background"]
    if picture.getextrema()[-1][1] == 0:  # a canvas that is transparent everywhere
        return None, None
    painted = np.zeros((picture.height, picture.width), dtype=bool)
    for layer in editor["layers"]:
        painted |= np.asarray(layer.resize(picture.size, Image.Resampling.NEAREST).getchannel("A")) > 0
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return opaque, Image.fromarray(painted.astype(np.uint8) * 255) if painted.any() else None


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture with each pixel a square, so that a brush hits some and not all of it."""
    factor = max(1, EASY_TO_PAINT // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def command_of(folder: str, ids: list[int], labels: list[int], seed: int, settings: SamplerSettings) -> str:
    """`xdlm-image sample` with the options that draw these images."""
    options = {"pipeline": folder, "class_labels": ids, "images_per_class": len(labels) // len(ids)}
    options |= {name: getattr(settings, name) for name in ("num_steps", "guidance_scale", "temperature")}
    options |= {name: getattr(settings, name) for name in ("sampler", "time_grid") if getattr(settings, name)}
    if settings.start:
        options |= {"image": "PICTURE.png", "strength": settings.start["strength"]}
        options |= {"mask": "MASK.png"} if "mask_image" in settings.start else {}
    options |= {"seed": seed, "output": "grid.png"}
    texts = {name: str([*value] if isinstance(value, tuple) else value) for name, value in options.items()}
    return " ".join(["xdlm-image sample", *(f"--{name} {shlex.quote(text)}" for name, text in texts.items())])
