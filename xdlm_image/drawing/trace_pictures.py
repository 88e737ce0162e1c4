"""A trace as a picture: a strip (PNG) of all states, or an animation (GIF) of one after the other.

This file owns layout, colours and captions; the states come from `trace`. Each image is a tile: the state's picture,
below it the map of what changed, below that how many places of each kind. The three colours are the paper's green,
blue and red (arXiv 2602.01362) in the hues of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from xdlm_image.drawing.opening import class_names
from xdlm_image.drawing.pictures import save_picture, to_picture
from xdlm_image.drawing.sampler_settings import SamplerSettings, call_arguments, with_scheduler
from xdlm_image.drawing.trace import (
    CODE_TO_CODE,
    CODE_TO_MASK,
    KEPT,
    MASK_TO_CODE,
    Trace,
    hatch,
    kinds_of_change,
    record,
)
from xdlm_image.files import write_atomic
from xdlm_image.pipelines import XDLMPipeline
from xdlm_image.recipes import SampleRecipe

COLOURS = {MASK_TO_CODE: (0, 158, 115), CODE_TO_CODE: (0, 114, 178), CODE_TO_MASK: (213, 94, 0)}
KEPT_COLOUR = (226, 226, 226)
NAMES = {MASK_TO_CODE: "mask to code", CODE_TO_CODE: "code to code", CODE_TO_MASK: "code to mask"}
SMALLEST_SIDE = 96  # smaller pictures are enlarged by a whole factor, each pixel a square
MAP_SIDE = 112  # about; a map's cells are whole pixels and no larger than the picture's
GAP = 6
MAX_COLUMNS = 17  # of a strip
MAX_IMAGES = 32  # of a trace that `sample` writes
FONT = ImageFont.load_default(13)
LINE = 18


def shown_states(num_states: int) -> list[int]:
    """Which states a strip shows: all; of more than `MAX_COLUMNS` that many, evenly spaced, both ends included."""
    if num_states <= MAX_COLUMNS:
        return list(range(num_states))
    return torch.linspace(0, num_states - 1, MAX_COLUMNS).round().int().tolist()


def save_strip(trace: Trace, path: str | Path, predictions: bool = False) -> Path:
    """Write one picture: a row an image, a column a state, each change counted since the state to its left.

    Of more than 17 states, 17 about evenly spaced ones are shown, and the picture says so.

    Args:
        trace: What to show.
        path: PNG file.
        predictions: Show what the network took each state for instead of the state.
    """
    states = shown_states(len(trace.codes))
    before = [None, *states[:-1]]
    kinds = [_kinds(trace, a, b) for a, b in zip(before, states)]
    columns = [
        _tiles(trace, state, kind, predictions)
        for state, kind in zip(tqdm(states, desc="strip", unit="state", leave=False), kinds)
    ]
    names = _row_names(trace)
    width, height = columns[0][0].size
    left = max([_text_width(name) for name in names], default=0) + 2 * GAP
    heads = [(_state_name(trace, state), f"t = {float(trace.times[state]):.3f}") for state in states]
    width = max([width, *(_text_width(text) for head in heads for text in head)])
    title = _title(trace, predictions)
    if len(states) < len(trace.codes):
        title += f"; {len(states)} of {len(trace.codes)} states, changes since the state to the left"
    counts = sum((_counts(kind) for kind in kinds[1:]), torch.zeros(4, dtype=torch.int64))
    top = 4 * LINE + 2 * GAP
    size = (left + len(states) * (width + GAP), top + len(names) * (height + GAP))
    picture = Image.new("RGB", (max(size[0], _text_width(title) + 2 * GAP, _legend(None, 0, counts)), size[1]), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, GAP), title, fill="black", font=FONT)
    _legend(picture, GAP + LINE, counts)
    for column, (tiles, head) in enumerate(zip(columns, heads)):
        x = left + column * (width + GAP)
        for line, text in enumerate(head):
            pen.text((x + width // 2, GAP + (2 + line) * LINE), text, fill="black", font=FONT, anchor="ma")
        for row, tile in enumerate(tiles):
            picture.paste(tile, (x + (width - tile.width) // 2, top + row * (height + GAP)))
    for row, name in enumerate(names):
        pen.text((left - GAP, top + row * (height + GAP) + height // 2), name, fill="black", font=FONT, anchor="rm")
    return save_picture(path, picture)


def save_gif(trace: Trace, path: str | Path, frame_ms: int = 500, predictions: bool = False) -> Path:
    """Write an animation that runs for ever: a frame a state, all images in it, the last frame held six times as long.

    Args:
        trace: What to show.
        path: GIF file.
        frame_ms: Milliseconds a state, at least 20 (viewers slow faster ones down).
        predictions: Show what the network took each state for instead of the state.

    Raises:
        ValueError: frame_ms is out of range.
    """
    if frame_ms < 20:
        raise ValueError(f"frame_ms={frame_ms!r}: at least 20, viewers slow faster ones down")
    frames = _frames(trace, predictions)
    first = next(frames)
    durations = [frame_ms] * (len(trace.codes) - 1) + [6 * frame_ms]

    def write(temporary: Path) -> None:
        first.save(
            temporary, format="GIF", save_all=True, append_images=frames, duration=durations, loop=0, optimize=False
        )

    return write_atomic(path, write)


def _frames(trace: Trace, predictions: bool) -> Iterator[Image.Image]:
    names = _row_names(trace)
    title = _title(trace, predictions)
    previous = None
    for state in tqdm(range(len(trace.codes)), desc="gif", unit="frame", leave=False):
        kinds = _kinds(trace, previous, state)
        tiles = _tiles(trace, state, kinds, predictions)
        width = max([tiles[0].width, *(_text_width(name) for name in names)])
        height = tiles[0].height + LINE
        columns = min(len(tiles), max(4, round((2.5 * len(tiles)) ** 0.5)))
        rows = -(-len(tiles) // columns)
        top = 3 * LINE + 2 * GAP
        counts = _counts(kinds)
        widest = _legend(None, 0, torch.full((4,), kinds.numel()))  # the same in every frame
        head = f"{_state_name(trace, state)}   t = {float(trace.times[state]):.3f}"
        across = max(GAP + columns * (width + GAP), widest, _text_width(title) + 2 * GAP)
        frame = Image.new("RGB", (across, top + rows * (height + GAP)), "white")
        pen = ImageDraw.Draw(frame)
        pen.text((GAP, GAP), title, fill="black", font=FONT)
        pen.text((GAP, GAP + LINE), head, fill="black", font=FONT)
        _legend(frame, GAP + 2 * LINE, counts)
        for i, (tile, name) in enumerate(zip(tiles, names)):
            x, y = GAP + i % columns * (width + GAP), top + i // columns * (height + GAP)
            pen.text((x + width // 2, y), name, fill="black", font=FONT, anchor="ma")
            frame.paste(tile, (x + (width - tile.width) // 2, y + LINE))
        yield frame.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        previous = state


def check_trace(recipe: SampleRecipe, num_classes: int) -> None:
    """Raise ValueError if the trace that a recipe asks for holds more than `MAX_IMAGES` images."""
    images = num_classes * recipe.trace_images
    if recipe.trace is not None and images > MAX_IMAGES:
        raise ValueError(
            f"trace={recipe.trace!r}: {num_classes} classes x trace_images={recipe.trace_images} are {images} images, "
            f"at most {MAX_IMAGES} fit; name fewer class_labels, or fewer trace_images"
        )


def write_trace(
    recipe: SampleRecipe, pipeline: XDLMPipeline, ids: Sequence[int], settings: SamplerSettings
) -> list[Path]:
    """Draw the first images of each row of the grid once more, recorded, and write what `recipe.trace` asks for.

    Returns:
        The files, beside `recipe.output`; none if no trace is asked for.
    """
    if recipe.trace is None:
        return []
    rows, columns = range(len(ids)), range(recipe.trace_images)
    labels = [ids[row] for row in rows for _ in columns]
    indices = [row * recipe.images_per_class + column for row in rows for column in columns]
    arguments = call_arguments(pipeline, labels, indices, recipe.seed, settings)
    recorded = record(with_scheduler(pipeline, settings), **arguments)
    predictions = recipe.trace_shows == "predictions"
    output = Path(recipe.output)
    written = []
    for kind in [recipe.trace] if isinstance(recipe.trace, str) else dict.fromkeys(recipe.trace):
        if kind == "strip":
            written.append(save_strip(recorded, output.with_suffix(".trace.png"), predictions))
        elif kind == "gif":
            path = output.with_suffix(".trace.gif")
            written.append(save_gif(recorded, path, recipe.trace_frame_ms, predictions))
        else:
            written.append(recorded.save_codes(output.with_suffix(".trace.npz")))
    return written


# --- one tile -------------------------------------------------------------------------------------


def _tiles(trace: Trace, state: int, kinds: torch.Tensor, predictions: bool) -> list[Image.Image]:
    """One tile an image: picture, map, counts."""
    images = (trace.predicted_images if predictions else trace.images)([state])[0]  # (B, C, H, W)
    return [
        _tile(image, codes == trace.mask, kind, state > 0)
        for image, codes, kind in zip(images, trace.codes[state], kinds)
    ]


def _tile(image: torch.Tensor, masked: torch.Tensor, kinds: torch.Tensor, counted: bool) -> Image.Image:
    """image (C, H, W) uint8, masked and kinds (h, w)."""
    rows, columns = kinds.shape
    factor = max(1, -(-SMALLEST_SIDE // image.shape[-1]))
    width, height = image.shape[-1] * factor, image.shape[-2] * factor
    cell = min(width // columns, max(4, MAP_SIDE // columns))
    across = max(width, columns * cell, 3 * _text_width("0000 "))
    tile = Image.new("RGB", (across, height + GAP // 2 + rows * cell + LINE), "white")
    picture = to_picture(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    tile.paste(picture, ((across - width) // 2, 0))
    tile.paste(_map(masked, kinds, cell), ((across - columns * cell) // 2, height + GAP // 2))
    if counted:
        pen = ImageDraw.Draw(tile)
        for i, (kind, colour) in enumerate(COLOURS.items()):
            middle = ((2 * i + 1) * across // 6, tile.height - LINE // 2)
            pen.text(middle, str(int((kinds == kind).sum())), fill=colour, font=FONT, anchor="mm")
    return tile


def _map(masked: torch.Tensor, kinds: torch.Tensor, cell: int) -> Image.Image:
    """Coloured squares where something changed, grey ones where a code was kept, hatched ones where a mask was."""
    rows, columns = kinds.shape
    palette = torch.tensor([KEPT_COLOUR, *COLOURS.values()], dtype=torch.uint8)
    large = palette[kinds.long()].repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (H, W, 3)
    kept_mask = (masked & (kinds == KEPT)).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    large = torch.where(kept_mask[..., None], hatch(rows * cell, columns * cell, cell)[..., None], large)
    large[::cell] = 255  # a white line between cells
    large[:, ::cell] = 255
    return Image.fromarray(large.numpy())


# --- captions -------------------------------------------------------------------------------------


def _kinds(trace: Trace, before: int | None, after: int) -> torch.Tensor:
    """Kinds of change (B, h, w) from one state to another; none before the first."""
    codes = trace.codes
    return kinds_of_change(codes[after if before is None else before], codes[after], trace.mask)


def _counts(kinds: torch.Tensor) -> torch.Tensor:
    return torch.bincount(kinds.flatten().long(), minlength=4)


def _state_name(trace: Trace, state: int) -> str:
    return "start" if state == 0 else f"step {state}"


def _title(trace: Trace, predictions: bool) -> str:
    k = trace.pipeline.scheduler.process.k
    name = {0.0: "MDLM", 1.0: "UDLM"}.get(k, "XDLM")
    steps = len(trace.codes) - 1
    what = ": what the network took each state for" if predictions else ""
    return f"{name} (k = {k:g}), {steps} step{'s' * (steps > 1)}{what}"


def _row_names(trace: Trace) -> list[str]:
    if trace.labels is None:
        return [""] * trace.codes.shape[1]
    names = class_names(trace.pipeline)
    return [_short(names[label].split(",")[0]) for label in trace.labels.tolist()]


def _short(name: str, longest: int = 20) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _text_width(text: str) -> int:
    return -int(-FONT.getlength(text) // 1)


def _legend(picture: Image.Image | None, y: int, counts: torch.Tensor) -> int:
    """Draw what the colours mean, with counts; returns the width it takes. None draws nothing."""
    side = LINE - 6
    entries = [(colour, f"{NAMES[kind]}: {int(counts[kind])}") for kind, colour in COLOURS.items()]
    swatches = [
        (Image.new("RGB", (side, side), colour), text) for colour, text in [*entries, (KEPT_COLOUR, "code kept")]
    ]
    swatches.append((Image.fromarray(hatch(side, side, side).numpy()), "mask kept"))
    x = GAP
    for swatch, text in swatches:
        if picture is not None:
            picture.paste(swatch, (x, y + 3))
            ImageDraw.Draw(picture).text((x + side + 4, y + LINE // 2), text, fill="black", font=FONT, anchor="lm")
        x += side + 4 + _text_width(text) + 2 * GAP
    return x
