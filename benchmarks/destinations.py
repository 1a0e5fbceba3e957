"""Where results go, as types of arguments: what cannot be written to is refused before the work, not after it."""

import os
from argparse import ArgumentTypeError
from pathlib import Path

__all__ = ["file", "folder"]


def file(text: str) -> Path:
    """A file to write; its folder is made if it is not there."""
    path = Path(text)
    _make(path.parent)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{text!r} is not a file that can be written")
    return path


def folder(text: str) -> Path:
    """A folder to write files in; it is made if it is not there."""
    path = Path(text)
    _make(path)
    if not os.access(path, os.W_OK):
        raise ArgumentTypeError(f"the folder {text!r} cannot be written to")
    return path


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"the folder {str(path)!r} cannot be made: {error.strerror}") from error
