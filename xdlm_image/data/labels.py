"""Names of classes that image folders call by WordNet ids: ImageNet's names and synsets, offline, from timm.

This file owns the way from a folder's name to what people call the class. How a label is looked up is
`pipelines.class_labels`'; an image set itself keeps the names of its folders, by which caches and sets are compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from timm.data import ImageNetInfo

SYNSET = re.compile(r"n\d{8}")


class Labels(NamedTuple):
    """What `XDLMPipeline` is told of its classes.

    Attributes:
        id2label: Class id -> name, with synonyms after commas.
        id2synset: Class id -> WordNet id; empty where the classes are not of WordNet.
    """

    id2label: dict[int, str]
    id2synset: dict[int, str]


def imagenet_labels(subset: str = "imagenet-1k") -> Labels:
    """Names and WordNet ids of an ImageNet label set, in the usual order of class ids.

    Args:
        subset: As timm calls it: `imagenet-1k` (1,000 classes), `imagenet-12k` (11,821), `imagenet-21k-miil` (11,221),
            `imagenet-22k` (21,841), `imagenet-22k-ms` (21,842), `imagenet-21k-goog` (21,843).

    Raises:
        ValueError: timm knows no such subset.
    """
    try:
        synsets = ImageNetInfo(subset).label_names()
    except AssertionError as error:
        raise ValueError(f"subset={subset!r}: timm knows no such label set; imagenet-1k has 1,000 classes") from error
    return labels_of_folders(synsets)


def labels_of_folders(names: Sequence[str]) -> Labels:
    """Names for the class folders of an image set, in the order of their ids.

    Where every folder is called by a WordNet id, as in ImageNet and in parts of it, the classes get WordNet's words and
    keep the ids as synsets; an id that timm does not know stays its own name. Other names stay as they are.

    Args:
        names: Folder of class 0, of class 1, and so on.
    """
    if not names or not all(SYNSET.fullmatch(name) for name in names):
        return Labels(dict(enumerate(names)), {})
    info = ImageNetInfo()
    return Labels({i: _words(info, synset) for i, synset in enumerate(names)}, dict(enumerate(names)))


def same_classes(labels: Labels, names: Sequence[str]) -> bool:
    """Whether the class ids of a pipeline mean the class folders `names`: by synsets where both have them, by names
    otherwise. A class without a name fits any folder.
    """
    folders = labels_of_folders(names)
    if labels.id2synset and folders.id2synset:
        return labels.id2synset == folders.id2synset
    return all(i < len(names) and label in (names[i], folders.id2label[i]) for i, label in labels.id2label.items())


def _words(info: ImageNetInfo, synset: str) -> str:
    try:
        return info.label_name_to_description(synset)
    except KeyError:
        return synset
