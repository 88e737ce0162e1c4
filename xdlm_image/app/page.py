"""The page: its controls, its buttons, and that only one call runs at a time."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any, get_args

from xdlm_image.app.asked import AS_SAVED, Asked, Models, enlarged
from xdlm_image.drawing.opening import class_names
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes.sampling import Sampler, TimeGrid
from xdlm_image.seeds import MAX_SEED

MOST_STEPS, MOST_GUIDANCE = 64, 10
SMALL = 64  # pixels of a side; those of smaller images are shown as squares
STYLE = ".small img {image-rendering: pixelated}"


class Work:
    """What keeps calls of pipelines one after the other, and ends them when the page is closed."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._stopping = False

    def __enter__(self) -> None:
        self._busy.acquire()

    def __exit__(self, *_: object) -> None:
        self._busy.release()

    def go_on(self, *_: object) -> None:
        """A hook before a network: raises RuntimeError once the page is being closed."""
        if self._stopping:
            raise RuntimeError("the page is being closed")

    def stop(self) -> None:
        """Wait until nothing is drawn; what is being drawn comes to its next step at most."""
        self._stopping = True
        with self:
            pass


def import_gradio() -> Any:
    """The module; raises ValueError where it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"gradio: not installed ({error}); pip install 'xdlm-image[app]' brings it") from error
    return gradio


def page(models: Models, work: Work) -> Any:
    """The `gradio.Blocks` of the page, not served yet."""
    gr = import_gradio()
    first = next((name for name, (_, of) in models.items() if 0 < of.scheduler.config.k < 1), next(iter(models)))
    of_classes, of_guidance, of_gallery = what_suits(models[first][1])
    for _, pipeline in models.values():
        pipeline.transformer.register_forward_pre_hook(work.go_on)
    files = tempfile.TemporaryDirectory(prefix="xdlm_image_")  # gone with the page
    samplers, grids = ([AS_SAVED, *get_args(choices)] for choices in (Sampler, TimeGrid))
    with gr.Blocks(title="xdlm_image", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Row():
            with gr.Column():
                model = gr.Dropdown([*models], value=first, label="Pipeline", visible=len(models) > 1)
                classes = gr.Dropdown(
                    **of_classes, multiselect=True, label="Classes", info="None: the first, as many as fit."
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
                seed = gr.Number(0, step=1, minimum=0, maximum=MAX_SEED - 1, label="Seed")
                with gr.Accordion("Begin at a picture", open=False):
                    editor = gr.ImageEditor(
                        type="pil", format="png", layers=False, label="Paint over what is to be new",
                        brush=gr.Brush(colors=["#d4005c"], color_mode="fixed"),
                    )  # fmt: skip
                    take = gr.Button("Take the image chosen on the right")
                    strength = gr.Slider(
                        0.05, 1, 0.6, step=0.05, label="Strength",
                        info="How far it is noised, or what is painted over; 1 keeps nothing of that.",
                    )  # fmt: skip
            with gr.Column():
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary")
                    show = gr.Button("Draw and show how")
                gallery = gr.Gallery(
                    **of_gallery, label="Images", format="png", type="pil", interactive=False, columns=4, height=520,
                    buttons=["download", "download_all", "fullscreen"],
                )  # fmt: skip
                told = gr.Markdown()
                command = gr.Textbox(label="The same as a command", buttons=["copy"])
                start = gr.File(label="What it begins at", file_count="multiple", visible=False, interactive=False)
                chosen = gr.State(0)
                film = gr.Image(type="filepath", format="gif", show_label=False, visible=False, buttons=["download"])

        def suit(name: str) -> tuple:
            one, *rest = (gr.update(**settings) for settings in what_suits(models[name][1]))
            return one, *rest, 1, 1

        def choose(event: Any) -> int:
            return int(event.index)

        def taken(images: list | None, index: int) -> dict[str, Any]:
            if not images:
                raise gr.Error("No image has been drawn yet: press Draw", print_exception=False)
            picture = enlarged(images[min(index, len(images) - 1)][0])
            return {"background": picture, "layers": [], "composite": picture}

        def drawn(*values: Any, progress: Any, filmed: bool) -> tuple:
            try:
                with work:
                    asked = Asked.of(models, *values)
                    images = asked.draw(progress)
                    path = asked.film(Path(files.name)) if filmed else None
                    paths = asked.save_start(Path(files.name))
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            captions = asked.captions()
            return (
                [*zip(images, captions)],
                asked.cost(),
                asked.command(),
                gr.update(value=paths, visible=bool(paths)),
                gr.update(value=path, visible=filmed),
            )

        own_progress = gr.Progress()  # as a default, by which gradio knows who wants it

        def on_draw(*values: Any, progress: Any = own_progress) -> tuple:
            return drawn(*values, progress=progress, filmed=False)

        def on_show(*values: Any, progress: Any = own_progress) -> tuple:
            return drawn(*values, progress=progress, filmed=True)

        given = [model, classes, per_class, steps, hot, cold, early, late, sampler, grid, seed, editor, strength]
        results = [gallery, told, command, start, film]
        alone = {"concurrency_id": "pipelines", "concurrency_limit": 1}  # who waits is told so
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        choose.__annotations__["event"] = gr.SelectData  # gradio looks there for what the event is to bring
        model.change(suit, model, [classes, guidance, gallery, early, late], **quiet)
        gallery.select(choose, None, chosen, **quiet)
        take.click(taken, [gallery, chosen], editor, api_visibility="private")
        draw.click(on_draw, given, results, api_name="draw", **alone)
        show.click(on_show, given, results, api_name="film", **alone)
    return blocks.queue(api_open=False)


def what_suits(pipeline: XDLMPipeline) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """How the page shows classes, guidance and images of the pipeline."""
    short = class_names(pipeline)
    names = [pipeline.id2label.get(i, name) if short.count(name) > 1 else name for i, name in enumerate(short)]
    choices = [(name, i) for i, name in enumerate(names)]
    small = max(pipeline.image_size) <= SMALL
    return (
        {"choices": choices, "value": [], "visible": bool(choices)},
        {"visible": bool(choices) and pipeline.config.supports_guidance},
        {"elem_classes": ["small"] if small else [], "object_fit": "contain"},
    )
