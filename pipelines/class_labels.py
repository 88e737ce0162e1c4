"""Class labels: ids, names, synonyms and synsets, told apart and turned into class ids.

This file owns what a label may be and every error about one. It never reads a file and knows no network; a pipeline
asks it. It imports only torch and the standard library, so that it can travel beside the weights.
"""

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

NEAREST = 5  # names that an error suggests
FEW = 20  # names that an error lists whole
SYNSET = re.compile(r"[a-z]\d{8}")  # WordNet: part of speech and offset, n01443537

ClassLabels = int | str | list[int | str] | tuple[int | str, ...] | torch.Tensor | None


def read_names(argument: str, names: Mapping[Any, Any] | None, num_classes: int | None) -> dict[int, str] | None:
    """A checked table class id -> text. JSON turns integer keys into strings: both are read, integers are kept.

    Args:
        argument: Name of the table for errors, `id2label` or `id2synset`.
        names: Class id -> text; need not name every class. None or empty for none.
        num_classes: Classes of the model, 0 for an unconditional one; None if not known.

    Raises:
        ValueError: A key that is no class id or comes twice, or a text that is empty or no text.
    """
    if not names:
        return None
    if not isinstance(names, Mapping):
        raise ValueError(f"{argument} is a {type(names).__name__}: give a dict, class id -> text")
    table: dict[int, str] = {}
    for key, text in names.items():
        if isinstance(key, bool) or not re.fullmatch(r"[0-9]+", str(key)):
            raise ValueError(f"{argument} has the key {key!r}: keys are class ids, whole numbers from 0")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{argument}[{key!r}] is {text!r}: must be a text that is not empty")
        if int(key) in table:
            raise ValueError(f"{argument} has the class {int(key)} twice, as a number and as a text: keep one")
        table[int(key)] = text
    strange = [] if num_classes is None else sorted(index for index in table if index >= num_classes)[:NEAREST]
    if strange:
        own = f"the transformer's are {_span(num_classes)}" if num_classes else "the transformer is unconditional"
        raise ValueError(f"{argument} names classes {strange}: {own}")
    return dict(sorted(table.items()))


def read_synsets(names: Mapping[Any, Any] | None, num_classes: int | None) -> dict[int, str] | None:
    """`read_names` for the table `id2synset`, whose texts are WordNet ids.

    Raises:
        ValueError: As `read_names`; also a text that is no WordNet id, or one that two classes share.
    """
    table = read_names("id2synset", names, num_classes)
    owner: dict[str, int] = {}
    for index, synset in (table or {}).items():
        if not SYNSET.fullmatch(synset):
            raise ValueError(f"id2synset[{index}] is {synset!r}: a WordNet id is a letter and 8 digits, n01443537")
        if owner.setdefault(synset, index) != index:
            raise ValueError(f"id2synset gives {synset!r} to the classes {owner[synset]} and {index}: keep one")
    return table


def resolve(
    class_labels: Any,
    num_classes: int | None,
    id2label: Mapping[int, str] | None = None,
    id2synset: Mapping[int, str] | None = None,
) -> list[int] | None:
    """Class ids of labels.

    An integer is a class id. A text is a name: a whole entry of `id2label` ("goldfish, Carassius auratus"), one of
    its comma-separated synonyms, or a synset ("n01443537"). Letters as written go before upper and lower case alike.
    A text that is no name and consists of digits is an id.

    Args:
        class_labels: One label, or several in a (nested) list, tuple, array or tensor, ids and texts mixed; None for
            an unconditional model.
        num_classes: Classes of the model; None for an unconditional one.
        id2label: Class id -> name.
        id2synset: Class id -> WordNet id.

    Returns:
        One id in [0, num_classes) a label, in order; None for an unconditional model.

    Raises:
        ValueError: A label that is no class, or a name of several classes: the error lists the nearest, or the
            several. Also no labels for a conditional model, or labels for an unconditional one.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(f"class_labels={_short(class_labels)}: this model is unconditional, pass None")
        return None
    if class_labels is None:
        raise ValueError(f"class_labels=None: this model needs ids ({_span(num_classes)}) or names")
    names: _Names | None = None
    ids = []
    for label in _flatten(class_labels):
        index: int | None
        if isinstance(label, str):
            names = names or _Names(id2label or {}, id2synset or {})  # built once a call, and only if needed
            index = names.find(label)
        else:
            index = _integer(label)
        if not 0 <= index < num_classes:
            raise ValueError(f"class_labels holds {label!r}: the classes are {_span(num_classes)}")
        ids.append(index)
    if not ids:
        raise ValueError("class_labels is empty: name at least one class")
    return ids


class _Names:
    """Every text that a class goes by, with the ids of the classes that go by it."""

    def __init__(self, id2label: Mapping[int, str], id2synset: Mapping[int, str]) -> None:
        self.id2label, self.id2synset = id2label, id2synset
        self.exact: dict[str, list[int]] = {}  # as written
        self.folded: dict[str, list[int]] = {}  # upper and lower case alike
        for index, entry in [*id2label.items(), *id2synset.items()]:
            for text in {_spaced(text) for text in (entry, *entry.split(","))} - {""}:
                self.exact.setdefault(text, []).append(index)
                self.folded.setdefault(text.casefold(), []).append(index)

    def find(self, label: str) -> int:
        """The one class that goes by `label`."""
        text = _spaced(label)
        found = self.exact.get(text) or self.folded.get(text.casefold()) or []
        if len(set(found)) == 1:
            return found[0]
        if found:
            candidates = "; ".join(self._describe(index) for index in sorted(set(found)))
            one = "ids or synsets" if self.id2synset else "ids"
            raise ValueError(f"class_labels={label!r} fits several classes, pass one of their {one}: {candidates}")
        if re.fullmatch(r"-?[0-9]{1,18}", text):
            return int(text)
        if not self.exact:
            raise ValueError(
                f"class_labels={_short(label)}: this pipeline has no id2label; pass the class id as an int, "
                "or id2label= where the pipeline is built"
            )
        raise ValueError(f"class_labels={_short(label)} is no class of this pipeline; {self._hint(text.casefold())}")

    def _describe(self, index: int) -> str:
        synset = f" ({self.id2synset[index]})" if index in self.id2synset else ""
        return f"{index}: {self.id2label.get(index, '')!r}{synset}"

    def _hint(self, text: str) -> str:
        text = text[:100]
        word = re.compile(rf"\b{re.escape(text)}\b", re.IGNORECASE)
        near = [name for name in self.exact if text and word.search(name)]
        if not near:
            written = {name.casefold(): name for name in self.exact}
            near = [written[name] for name in difflib.get_close_matches(text, written, n=NEAREST, cutoff=0.5)]
        if near:
            return f"the nearest are {near[:NEAREST]}"
        few = len(self.id2label) <= FEW
        return (
            f"its classes are {[*self.id2label.values()]}" if few else f"pipe.id2label has {len(self.id2label)} names"
        )


def _flatten(labels: Any) -> list[Any]:
    """Labels in one list, however they were nested; a name is one label, not a list of letters."""
    if isinstance(labels, torch.Tensor):
        return labels.reshape(-1).tolist()
    if getattr(labels, "shape", None) == ():  # a number of numpy
        return [labels.item()]
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        return [labels]
    if isinstance(labels, bytes | bytearray | Mapping | set | frozenset):
        raise ValueError(f"class_labels holds a {type(labels).__name__}: give ids and names, several in a list")
    return [label for item in labels for label in _flatten(item)]


def _integer(label: Any) -> int:
    try:
        if not isinstance(label, bool):
            return operator.index(label)
    except TypeError:
        pass
    raise ValueError(f"class_labels holds {_short(label)}: a label is an int or a name")


def _spaced(name: str) -> str:
    return " ".join(name.split())


def _span(num_classes: int) -> str:
    return f"0 to {num_classes - 1}" if num_classes > 1 else "0 only"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
