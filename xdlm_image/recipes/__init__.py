"""What every recipe may say: one dataclass a verb, its fields, defaults and ranges.

This file owns names, defaults and range checks, and nothing else: it imports no torch, so that
`xdlm-image VERB --help` answers at once. The YAML files in `configs/` and the command line fill these classes;
the packages whose verbs they describe read them.
"""

from xdlm_image.recipes.conversion import ConversionRecipe, ConvertXDLMRecipe
from xdlm_image.recipes.data import WHERE_IMAGES_ARE, DataOptions, EncodeRecipe
from xdlm_image.recipes.evaluation import DemoRecipe, EvaluateRecipe, NeighboursRecipe, ReferenceRecipe
from xdlm_image.recipes.features import ExtractorRecipe
from xdlm_image.recipes.nelbo import NelboRecipe
from xdlm_image.recipes.publishing import ExportRecipe
from xdlm_image.recipes.sampling import AppRecipe, SampleRecipe
from xdlm_image.recipes.tokenizer import TokenizerModelOptions, TokenizerRecipe
from xdlm_image.recipes.training import ProcessOptions, TrainRecipe, TransformerOptions

__all__ = [
    "WHERE_IMAGES_ARE",
    "AppRecipe",
    "ConversionRecipe",
    "ConvertXDLMRecipe",
    "DataOptions",
    "DemoRecipe",
    "EncodeRecipe",
    "EvaluateRecipe",
    "ExportRecipe",
    "ExtractorRecipe",
    "NelboRecipe",
    "NeighboursRecipe",
    "ProcessOptions",
    "ReferenceRecipe",
    "SampleRecipe",
    "TokenizerModelOptions",
    "TokenizerRecipe",
    "TrainRecipe",
    "TransformerOptions",
]
