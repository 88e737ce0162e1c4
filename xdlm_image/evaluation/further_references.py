"""References beside the main one: FID of the same images against each, in one sweep.

Numbers against two references do not compare: papers that train on ImageNet judge by its validation images or by ADM's
statistics of training images, and a table is read beside others only if it says its own. This file owns what is known
of such references: their statistics, and so FID and its floors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdlm_image.evaluation.cells import refuse_name
from xdlm_image.evaluation.comparing import fids
from xdlm_image.evaluation.measuring import Measured
from xdlm_image.evaluation.reference_files import is_reference_file, open_reference_file
from xdlm_image.evaluation.references import Reference, open_reference
from xdlm_image.features.extractor import FeatureExtractor


def open_further(named: Mapping[str, str], extractor: FeatureExtractor, shape: tuple[int, int]) -> dict[str, Reference]:
    """Name -> reference, opened.

    Args:
        named: Name -> folder of the verb `reference`, file of statistics, or key of `reference_files.KNOWN`.
        extractor: Of the sweep.
        shape: Channels and side in pixels of the sweep's images.

    Raises:
        FileNotFoundError, OSError, ValueError: It is not there, or of other features, or of images of another shape.
    """
    found = {}
    for name, place in named.items():
        refuse_name("further_references", name)
        argument = f"further_references.{name}"
        try:
            is_file = is_reference_file(place)
            found[name] = open_reference_file(place, extractor)[0] if is_file else open_reference(place, extractor)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{argument}: {error}") from error
        except OSError as error:
            raise OSError(f"{argument}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
        about = found[name].about["images"]
        if about["image_size"] is not None and (about["channels"], about["image_size"]) != shape:
            raise ValueError(
                f"{argument}={place!r}: is of images of (channels, size) {(about['channels'], about['image_size'])}, "
                f"the sweep's are {shape}; name another"
            )
    return found


def fids_further(samples: Measured, further: Mapping[str, Reference]) -> dict[str, Any]:
    """`fid_further` of a cell or set of images: name -> layer -> FID; nothing where there is no such reference."""
    if not further:
        return {}
    return {"fid_further": {name: fids(samples, other.images) for name, other in further.items()}}


def floors_further(
    reference: Reference, further: Mapping[str, Reference], pipelines: Mapping[str, str]
) -> dict[str, Any]:
    """`further` of the floors: name -> FID of the main reference's own images, and of their reconstructions.

    Args:
        reference: The main one.
        further: The others.
        pipelines: Name -> tokenizer hash.
    """
    if not further:
        return {}
    floors = {}
    for name, other in further.items():
        rebuilt = []
        for tokenizer, measured in reference.reconstructions.items():
            users = [pipeline for pipeline, used in pipelines.items() if used == tokenizer]
            if users:
                rebuilt.append({"pipelines": users, "fid": fids(measured, other.images)})
        floors[name] = {"reference": {"fid": fids(reference.images, other.images)}, "reconstruction": rebuilt}
    return {"further": floors}
