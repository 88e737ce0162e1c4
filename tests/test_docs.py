"""The code of README.md and docs/*.md runs as it stands there.

The `python` blocks of a document run in order in one namespace, its `bash` blocks through the command line, in a folder
that holds nothing but `shipped`. A block after `<!-- not run: reason -->` is
listed as skipped. A failure names the document and the line.
"""

import re
import shlex
from pathlib import Path

import matplotlib
import pytest
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from xdlm_image.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
DATA = {"text", "json", "yaml"}  # shown, not run
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


def run_bash(example: Example) -> None:
    """Run each line of a block, all of which call `xdlm-image`."""
    for found in re.finditer(r"(?:[^\n]*\\\n)*[^\n]*", example.parsed):  # one command, its backslashes included
        words = shlex.split(found[0].replace("\\\n", ""), comments=True)
        if not words:
            continue
        line = example.line + 1 + example.parsed.count("\n", 0, found.start())
        place = f"{example.path}:{line}: {shlex.join(words)}"
        if words[0] != "xdlm-image":
            pytest.fail(f"{place}\nonly xdlm-image is run; put <!-- not run: reason --> above the block", pytrace=False)
        try:
            status = main(words[1:])
        except SystemExit as stop:  # --help, or options that the parser refuses
            status = stop.code
        if status:
            pytest.fail(f"{place}\nended with status {status}; its message stands below", pytrace=False)


EVALUATORS = {"python": PythonEvaluator(), "bash": run_bash}


def blocks(document: Document):
    """The fenced blocks that run. Raises ValueError for a language that nobody would run."""
    for region in FencedCodeBlockLexer(r"[^\n]*")(document):
        language = region.lexemes["language"].strip()
        if language in EVALUATORS:
            region.parsed, region.evaluator = region.lexemes["source"], EVALUATORS[language]
            yield region
        elif language not in DATA:
            known = ", ".join([*EVALUATORS, *sorted(DATA)])
            raise ValueError(f"{document.path}: {document.line_column(region.start)}: ```{language}: one of {known}")


def reason_not_to_run(example: Example) -> str | None:
    """What the comment just above the block says, if there is one."""
    found = NOT_RUN.search(example.document.text[: example.start])
    return found[1] if found else None


@pytest.fixture
def place(tmp_path, monkeypatch, modules) -> Path:
    """The folder where a document's code runs."""
    (tmp_path / "shipped").symlink_to(ROOT / "shipped")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    return tmp_path


def run_document(path: Path, subtests: pytest.Subtests) -> None:
    document = Document.parse(str(path), blocks)
    document.namespace["__name__"] = "__main__"
    for example in document:
        reason = reason_not_to_run(example)
        if reason is None:
            example.evaluate()
            continue
        with subtests.test(f"line {example.line}"):
            pytest.skip(f"{path.name}:{example.line}: {reason}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.relative_to(ROOT).as_posix() for path in DOCUMENTS])
def test_the_code_of_a_document_runs(path, place, subtests):
    run_document(path, subtests)


def test_a_failure_names_document_and_line(place, subtests):
    (place / "a.md").write_text("text\n\n```python\nn = 0\n\ndef f():\n    return 1 / n\n```\n\n```python\nf()\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run_document(place / "a.md", subtests)
    lines = [(entry.path.name, entry.lineno + 1) for entry in error.traceback]
    assert lines[-2:] == [("a.md", 11), ("a.md", 7)]

    command = "```bash\n# a comment\nxdlm-image \\\n    --version\n\nxdlm-image train --config nowhere  # wrong\n```\n"
    (place / "b.md").write_text(command)
    with pytest.raises(pytest.fail.Exception, match=r"b\.md:6: xdlm-image train --config nowhere\nended with status 2"):
        run_document(place / "b.md", subtests)
    (place / "c.md").write_text("\n```bash\nls\n```\n")
    with pytest.raises(pytest.fail.Exception, match=r"c\.md:3: ls\nonly xdlm-image is run"):
        run_document(place / "c.md", subtests)
    (place / "d.md").write_text("\n```pyhton\n1 / 0\n```\n")
    with pytest.raises(ValueError, match=r"d\.md: line 2.*```pyhton"):
        run_document(place / "d.md", subtests)


def test_a_skipped_block_is_not_run_and_says_why(tmp_path):
    (tmp_path / "a.md").write_text("<!-- not run: a download -->\n```python\n1 / 0\n```\n\n```python\n2 / 0\n```\n")
    first, second = Document.parse(str(tmp_path / "a.md"), blocks)
    assert reason_not_to_run(first) == "a download" and reason_not_to_run(second) is None
