"""What a recipe file may be: looked at before it is parsed, so that a file from elsewhere can neither run nor fill
anything.

This file owns the limits and their errors; what the options mean is told by the recipes. Values are built only when
PyYAML's nodes have shown that they are plain and few.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1_000_000  # bytes
MOST_VALUES = 100_000  # with every alias written out
DEEPEST = 50
PLAIN = "tag:yaml.org,2002:"
TAGS = {PLAIN + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp")}


def check_recipe_file(path: str | Path, groups: Collection[str] = ()) -> None:
    """Refuse what cannot be a recipe.

    Args:
        path: The file.
        groups: Options that hold options themselves. jsonargparse imports a class that stands in their place, and
            opens a file that does.

    Raises:
        ValueError: No plain file, too large, no text, no YAML, tags that would build Python objects, aliases that
            multiply beyond measure, something else than options with values, an option twice, or names of classes or
            files where options belong. The message names the file.
    """
    name = f"--config {str(path)!r}"
    if not Path(path).is_file():
        raise ValueError(f"{name} is a folder or no plain file: name a YAML file in it")
    if Path(path).stat().st_size > LARGEST:
        raise ValueError(f"{name} has {Path(path).stat().st_size} bytes, a recipe at most {LARGEST}: name a recipe")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"{name} is nested more than {DEEPEST} deep: it is no recipe")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8 ({error}): name a YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {error}") from error
    if root is None:
        raise ValueError(f"{name} is empty: write options into it, one a line, as in max_steps: 1000")
    _count(root, name, {})
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{name} holds no options: write them one a line, as in max_steps: 1000")
    try:
        options = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a key that is a list, a date that is none
        raise ValueError(f"{name} cannot be read: {error}") from error
    for option, value in options.items():
        if option == "config":
            raise ValueError(f"{name} names another recipe: nothing was read; write its options here")
        if option in groups and not isinstance(value, dict):
            raise ValueError(f"{name}: {option} is {str(value)[:80]!r}; write its options below it, one a line")
        _refuse_classes(option, value, name)


def _refuse_classes(option: Any, value: Any, name: str) -> None:
    if str(option).rpartition(".")[2] in ("class_path", "init_args"):
        raise ValueError(f"{name} has {option}: recipes name no Python classes; nothing was imported, take it out")
    for key, child in value.items() if isinstance(value, dict) else ():
        _refuse_classes(key, child, name)


def _count(node: yaml.Node, name: str, known: dict[int, int]) -> int:
    """Values at and below a node, aliases written out; `known` holds those of nodes that were counted."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"{name}: an alias stands inside of what it stands for (line {node.start_mark.line + 1})")
        return known[id(node)]
    known[id(node)] = 0
    if node.tag not in TAGS:
        raise ValueError(
            f"{name} has the tag {node.tag.replace(PLAIN, '!!')!r} in line {node.start_mark.line + 1}: recipes hold "
            "plain values only, nothing of it was run; take the tag out"
        )
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != PLAIN + "merge"]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise ValueError(f"{name} has {twice} twice below line {node.start_mark.line + 1}: keep one")
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, name, known) for child in children)
    if total > MOST_VALUES:
        raise ValueError(f"{name}: its aliases stand for more than {MOST_VALUES} values; write out what you mean")
    known[id(node)] = total
    return total
