"""The code that travels beside weights: which files, under which names, and what `model_index.json` says of them.

This file owns following relative imports from the module of a class, and the names. It never saves weights and never
loads anything. It imports only the standard library and diffusers, so that it can travel beside the weights itself.

Every file of code is called `<name>_<version>_<hash of its content>`, because diffusers copies the remote code of all
folders into one place: two files of one name would overwrite each other there.
"""

import ast
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports

REMOTE = "diffusers_modules"  # diffusers makes the code it loads from folders and repositories modules of this package
VERSIONED = re.compile(r"\w+_[0-9a-f]{8}")
# What travelling code may import: all of it stands wherever diffusers runs
LIBRARIES = sys.stdlib_module_names | {"torch", "diffusers", "huggingface_hub", "numpy", "PIL", "safetensors"}


def code_of(module_name: str, also_named: list[str] | None = None) -> dict[str, str]:
    """A module's file and every sibling it imports, under the names they travel by.

    Relative imports are rewritten to those names. diffusers copies only the siblings that the first file itself names
    in its text, so siblings of siblings are named in a block that never runs. Code that has travelled already keeps
    its names.

    Args:
        module_name: A module that is imported.
        also_named: Files of other folders that the first file must name, as `folder.name`.

    Returns:
        Name without `.py` -> text; the module itself comes first.

    Raises:
        ValueError: The module has no file, imports a library that travelling code may not count on, imports something
            relative that is no file beside it, or imports itself in a circle.
    """
    source = getattr(sys.modules.get(module_name), "__file__", None)
    if source is None:
        raise ValueError(f"{module_name}: this module has no file that could travel; define the class in a file")
    files: dict[Path, tuple[str, str]] = {}  # the way to a file -> its travelling name and text
    _collect(Path(source), module_name.startswith(REMOTE + "."), files, (), also_named or [])
    first = files.pop(Path(source))
    return dict([first, *files.values()])


def _collect(
    path: Path,
    travelled: bool,
    files: dict[Path, tuple[str, str]],
    importers: tuple[Path, ...],
    also_named: list[str] | None = None,
) -> None:
    """Add `path` and its siblings to `files`, siblings first: their names go into its text, and so into its name."""
    if path in files:
        return
    if path in importers:
        raise ValueError(f"{path.name}: imports itself by way of {importers[-1].name}; code in circles cannot travel")
    lines = path.read_text(encoding="utf-8").split("\n")  # as the parser counts them: a form feed ends no line
    for node in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            libraries = [alias.name for alias in node.names]
        else:
            libraries = [node.module or ""] if node.level == 0 else []
        for library in libraries:
            if library.partition(".")[0] not in LIBRARIES:
                raise ValueError(
                    f"{path.name}, line {node.lineno}: imports {library!r}, which need not stand where the code is "
                    "loaded; travelling code imports torch, diffusers, the standard library and files beside it"
                )
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            if travelled and "." in (node.module or ""):
                continue  # named for other folders, which bring it themselves
            sibling = path.with_name(f"{node.module}.py")
            line, column = node.lineno - 1, node.col_offset
            statement = re.match(rf"from\s*\.\s*{node.module}\b", lines[line][column:])
            if node.level != 1 or not sibling.is_file() or statement is None:
                raise ValueError(
                    f"{path.name}, line {node.lineno}: {ast.unparse(node)!r} cannot travel; "
                    "write 'from .name import ...' with name.py in the same folder"
                )
            _collect(sibling, travelled, files, (*importers, path))
            rest = lines[line][column + statement.end() :]
            lines[line] = f"{lines[line][:column]}from .{files[sibling][0]}{rest}"
    text = "\n".join(lines)
    if travelled:
        files[path] = (path.stem, text)
        return
    if not importers:
        named = set(_named_siblings(text))
        unnamed = sorted({name for name, _ in files.values()} - named) + sorted(also_named or [])
        if unnamed:
            text += "\nif False:  # never runs: diffusers fetches the files that this file names\n"
            text += "".join(f"    from .{name} import *\n" for name in unnamed)
    version = re.sub(r"\W", "_", importlib.metadata.version("xdlm-image"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    files[path] = (f"{path.stem}_{version}_{digest}", text)


def _named_siblings(text: str) -> list[str]:
    return re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)


def add_code(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Put the code of a pipeline and of its parts into the folder it was saved to, and name it in `model_index.json`.

    Where the parts were loaded from, a path of this machine, goes out of every configuration.

    Raises:
        ValueError: Code that cannot travel, see `code_of`.
    """
    parts = {}  # part -> name of its code
    siblings = []
    for part, component in pipeline.components.items():
        module_name = type(getattr(component, "_orig_mod", component)).__module__
        if component is None or module_name.partition(".")[0] in ("diffusers", "transformers"):
            continue
        code = code_of(module_name)
        parts[part], *others = code
        siblings += [f"{part}.{other}" for other in others]
        _write_code(folder / part, code)
    code = code_of(type(pipeline).__module__, siblings)
    _write_code(folder, code)

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [next(iter(code)), type(pipeline).__name__]
    for part, name in parts.items():
        index[part][0] = name
    index.pop("_name_or_path", None)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for part in pipeline.components:  # and no other file: the folder may hold other people's too
        for path in (folder / part).glob("*config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_code(folder: Path, code: Mapping[str, str]) -> None:
    for name, text in code.items():
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        unknown = [other for other in get_relative_imports(path) if "." not in other and other not in code]
        imports = re.findall(r"^\s*(?:import\s+([\w.]+)\s*$|from\s+([\w.]+)\s+import)", text, flags=re.MULTILINE)
        libraries = {("".join(found)).partition(".")[0] for found in imports} - {""}
        unknown += sorted(libraries - LIBRARIES)
        if unknown:  # diffusers finds imports by pattern, and asks for what a line of a text may look like
            raise ValueError(f"{name}: a text in it reads like an import of {unknown[0]!r} to diffusers; reword it")
