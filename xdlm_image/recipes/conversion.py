"""Recipes of the converters: the verbs `convert-llamagen`, `convert-taming` and `convert-xdlm`."""

from __future__ import annotations

from dataclasses import dataclass

from xdlm_image.recipes.checks import require, require_at_least


@dataclass
class ConversionRecipe:
    """Turn a checkpoint of another project into a folder of this one's layout.

    Attributes:
        checkpoint: The file: safetensors, or of torch.save; it is read without running anything in it.
        output: Folder for the result, with `provenance.json`.
        licence: Licence of the weights, as their publisher states it; goes into `provenance.json`.
        url: Where the file came from; goes into `provenance.json`.
        overwrite: Replace an earlier conversion in `output`.
    """

    checkpoint: str
    output: str
    licence: str | None = None
    url: str | None = None
    overwrite: bool = False


@dataclass(kw_only=True)
class ConvertXDLMRecipe(ConversionRecipe):
    """Turn an official XDLM, MDLM or UDLM checkpoint (codes, class-conditional or not) into a pipeline.

    Attributes:
        checkpoint: The file: safetensors, or of torch.save; it is read without running anything in it.
        output: Folder for the pipeline, with `provenance.json`.
        tokenizer: Folder of the tokenizer whose codes the network learned, from `convert-llamagen` or
            `convert-taming`.
        licence: Licence of the weights, as their publisher states it; goes into `provenance.json`.
        url: Where the file came from; goes into `provenance.json`.
        overwrite: Replace an earlier conversion in `output`.
        k: Weight of uniform noise of the training: 0 for MDLM, 1 for UDLM. None: what the file's settings say.
        ema: Take the averaged weights; false takes the last ones.
        sample_size: Side of the square grid of codes.
        num_attention_heads: Heads of a block. None: what the file says; where it says nothing, one for 64 channels.
    """

    tokenizer: str
    k: float | None = None
    ema: bool = True
    sample_size: int = 16
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        require(
            self.k is None or self.k == 0 or 1e-20 <= self.k <= 1, "k", self.k, "must lie in [0, 1] (0: MDLM, 1: UDLM)"
        )
        require_at_least(self, 1, "sample_size", "num_attention_heads")
