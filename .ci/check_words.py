"""Refuses words that docs/glossary.md retires, docstrings that are too short, and arguments not described by a noun.

python .ci/check_words.py                  # all code and all pages
python .ci/check_words.py comm/flat.py     # some files or folders
python .ci/check_words.py --count          # how many of each, and nothing else
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
PACKAGES = ("comm", "optimizers", "frameworks", "cli", "examples", "benchmarks", "tests")
PAGES = ("README.md", "CONTRIBUTING.md", "docs")
RESULTS = ROOT / "benchmarks" / "results"
"""Records of measurements are left as they were written."""
TESTS = ROOT / "tests"
"""Tests are checked for retired words alone: a short docstring is enough for a function of a test."""
TEST_OF_THIS = TESTS / "test_words.py"
SHORTEST_DOCSTRING = 25
"""Characters. Shorter ones repeat the name, or say nothing."""
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
"""Code in a page: a block, or a part of a line."""
SECTION = re.compile(r"(Args|Attributes):$")
FRAGMENT = re.compile(r"    \*{0,2}\w+: (of|by|that|which|who|whose|tells?)\b")
"""Description of an argument that begins with a relative clause or an attribute, whose noun the reader must guess."""
ALLOWED = "check_words: allow"
"""A line that holds this comment is left out: for the few places where a retired word is the right one."""


def retired() -> dict[str, re.Pattern[str]]:
    """Pattern of each word in the first column of the glossary's last table."""
    table = GLOSSARY.read_text().partition("## Retired words")[2]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[5:] if line.startswith("| ")]
    words = [word.strip() for row in rows for word in row.split(",")]
    return {
        word: re.compile(r"\b" + r"\s+".join(map(re.escape, word.split())) + r"\b", re.IGNORECASE) for word in words
    }


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of everything in a file that is read by people."""
    source = path.read_text()
    if path.suffix != ".py":
        if path.resolve() != GLOSSARY:
            yield 1, CODE.sub(lambda code: "\n" * code[0].count("\n"), source)
        return
    lines = source.splitlines()
    in_string: list[str] = []
    started = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if ALLOWED in lines[min(token.start[0], len(lines)) - 1]:
            continue
        if kind == "NAME":
            yield token.start[0], token.string.replace("_", " ")
        elif kind in ("STRING", "COMMENT"):
            yield token.start[0], token.string
        elif kind == "FSTRING_START":
            in_string, started = [], token.start[0]
        elif kind == "FSTRING_MIDDLE":
            in_string.append(token.string)
        elif kind == "FSTRING_END":
            yield started, "{}".join(in_string)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each docstring of a module, class or function."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    for node in waiting:  # statements alone: expressions contain no docstring
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def fragments(docstring: str) -> Iterator[tuple[int, str]]:
    """Line number within a docstring, and text, of each argument that is described by a relative clause."""
    is_section = False
    for number, line in enumerate(docstring.splitlines()):
        if not line.startswith(" "):
            is_section = SECTION.match(line) is not None or (is_section and not line)
        elif is_section and FRAGMENT.match(line):
            yield number, line.strip()


def findings(path: Path, patterns: dict[str, re.Pattern[str]]) -> Iterator[tuple[int, str, str]]:
    """Line number, message and kind of everything that is wrong in a file."""
    any_word = re.compile("|".join(pattern.pattern for pattern in patterns.values()), re.IGNORECASE)
    for line, text in texts_of(path):
        if not any_word.search(text):  # much faster than to search for each of them
            continue
        for word, pattern in patterns.items():
            for match in pattern.finditer(text):
                yield line + text.count("\n", 0, match.start()), f"retired word {match[0]!r}", word
    has_reference = path.suffix == ".py" and not path.resolve().is_relative_to(TESTS)
    for line, text in docstrings(path) if has_reference else ():
        if len(text) < SHORTEST_DOCSTRING:
            yield line, f"docstring is shorter than a sentence: {text!r}", "short docstring"
        for number, fragment in fragments(text):
            yield line + number, f"description is no noun phrase: {fragment!r}", "fragment"


def files_in(place: Path) -> list[Path]:
    """The Python files and pages of a folder, or the file itself."""
    if place.is_dir():
        found = {path for suffix in ("*.py", "*.md") for path in place.rglob(suffix)}
        left_out = {path for path in found if path.resolve().is_relative_to(RESULTS) or path.resolve() == TEST_OF_THIS}
        return sorted(found - left_out)
    return [place] if place.exists() else []


def main() -> int:
    """Print what was found; the status is 1 if there is anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, help="files and folders; by default all")
    parser.add_argument("--count", action="store_true", help="print only how many of each there are")
    options = parser.parse_args()
    patterns = retired()
    counts: Counter[str] = Counter()
    places = options.places or [ROOT / place for place in (*PACKAGES, *PAGES)]
    for path in [file for place in places for file in files_in(place)]:
        found = sorted(findings(path, patterns))
        counts.update(kind for _, _, kind in found)
        if not options.count:
            for line, message, _ in found:
                print(f"{path}:{line}: {message}")
    if options.count:
        print("\n".join(f"{number:5d} {kind}" for kind, number in counts.most_common()) or "none")
    elif counts:
        print(f"{counts.total()} found. docs/glossary.md says which words to use instead.")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
