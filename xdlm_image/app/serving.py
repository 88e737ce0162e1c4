"""The verb `app`: a page in the browser on which pipelines draw, begin at a picture and inpaint.

This file owns how the page is served and closed; gradio, of the extra `app`, does the serving.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NoReturn

from xdlm_image.app.page import STYLE, Work, import_gradio, page
from xdlm_image.devices import best_device
from xdlm_image.drawing.opening import open_pipeline
from xdlm_image.recipes import AppRecipe
from xdlm_image.shipped_models import models_folder, shipped_pipelines

LARGEST_FILE = "20mb"  # that is uploaded


def app(recipe: AppRecipe) -> NoReturn:
    """Serve the page until it is interrupted; what is being drawn then ends at its next step.

    Raises:
        FileNotFoundError, ValueError: No such pipeline, or it cannot be loaded; or gradio is not installed.
        OSError: Nothing can listen at the host and the port.
    """
    import_gradio()  # before anything is loaded
    refuse_unheard(recipe.host, recipe.port)
    device = best_device(recipe.device)
    folders = recipe.pipelines or shipped_folders()
    models = {name: (folder, open_pipeline(folder, device, f"pipelines.{name}")) for name, folder in folders.items()}
    work = Work()
    served = page(models, work)
    _, url, _ = served.launch(
        server_name=recipe.host, server_port=recipe.port, inbrowser=recipe.open_browser, css=STYLE, share=False,
        quiet=True, prevent_thread_lock=True, run_history=False, max_file_size=LARGEST_FILE,
    )  # fmt: skip
    print(f"{url}   (Ctrl-C closes it)", flush=True)
    try:
        while True:
            time.sleep(1)
    finally:
        work.stop()
        served.close(verbose=False)


def refuse_unheard(host: str, port: int | None) -> None:
    """Raise ValueError if there is no such host, OSError if the port cannot be had there."""
    try:
        addresses = socket.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"host={host!r}: no IPv4 address of a machine ({error}); 127.0.0.1 is this one, 0.0.0.0 lets others in"
        ) from error
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(f"host={host!r}, port={port}: cannot be listened at ({error}); name others") from error


def shipped_folders() -> dict[str, str]:
    """Name -> folder of the models that a checkout ships."""
    try:
        return {name: os.path.relpath(path) for name, path in shipped_pipelines(models_folder(None)).items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "pipelines={}: no shipped models here, as the package is no checkout; name yours, as in --pipelines "
            "'{mine: runs/mine/xdlm/pipeline}'"
        ) from error
