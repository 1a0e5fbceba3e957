"""The code blocks of the pages of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHING = ROOT / "docs/launching.md"

BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The contents of all code blocks of a page in a language, in their order."""
    return [content for found, content in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """The commands of all ``sh`` blocks of a page, each once, with continued lines joined."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for line in lines if line.strip()))
