"""The part of a model card that needs no knowledge of a training run: what the pipeline is, and how to load it.

This file owns those texts. It imports only the standard library, diffusers and huggingface_hub, and travels beside the
weights: a pipeline that was loaded without the package can still say what it is.
"""

import json

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import ModelCardData

TAGS = ["discrete-diffusion", "xdlm", "class-conditional", "custom_code", "arxiv:2602.01362"]
PIPELINE_TAG = "unconditional-image-generation"  # the hub's name for generation without a prompt text
# no line of this file may begin with an import of the package, not even in a text: diffusers would ask for it
HOW_TO_LOAD = (
    """\
## How to load

The code stands beside the weights; read it before you let it run. From a hub, name the commit you have read by its
full hash, so that the code that runs is the code you have read:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "{name}",
    revision="<full hash of the commit>",
    trust_remote_code=True,
)
images = pipe({example}num_steps=8).images
```

{stands_for}A folder on your own machine needs no `revision`. Where the package `xdlm-image` is installed, no code of
this folder need run:

```python
"""
    "from xdlm_image import XDLMPipeline"
    """

pipe = XDLMPipeline.from_pretrained("{name}")
```
"""
)


def plain_card(pipeline: DiffusionPipeline, name: str) -> str:
    """A card that says what is not known."""
    data = ModelCardData(library_name="diffusers", pipeline_tag=PIPELINE_TAG, tags=TAGS)
    text = (
        f"# {name}\n\nImage generation in few steps by discrete diffusion on VQ codes (XDLM, arXiv 2602.01362).\n\n"
        "Data, training, quality and licence of the weights: not stated.\n\n"
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}{how_to_load(pipeline, name)}"


def how_to_load(pipeline: DiffusionPipeline, name: str) -> str:
    """The section of a card that shows the two ways to load."""
    conditional = pipeline.components["transformer"].config.num_classes is not None
    example = _example_label(pipeline) + ", " if conditional else ""
    repository = name if "/" in name else f"OWNER/{name}"
    stands_for = "" if "/" in name else f"`{repository}` stands for the repository, or the folder. "
    return HOW_TO_LOAD.format(name=repository, example=example, stands_for=stands_for)


def _example_label(pipeline: DiffusionPipeline) -> str:
    """A class as a call names it: by the first name that it shares with no other, else by its id."""
    index, entry = next(iter((pipeline.config.get("id2label") or {0: ""}).items()))
    for name in entry.split(","):
        try:
            pipeline.get_label_ids(name)
        except ValueError:
            continue
        return json.dumps(name.strip(), ensure_ascii=False)
    return str(index)
