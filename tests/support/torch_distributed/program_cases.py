"""The cases that a job runs: the public functions of some modules of this folder, by module and name."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = ("communication", "ddp", "averaging", "sharded", "checkpoints")


def names() -> list[str]:
    """Read from the source text: the test that collects them does not load PyTorch's optimizers and trackers."""
    return [
        f"{module}.{node.name}"
        for module in MODULES
        for node in ast.parse(Path(__file__).with_name(f"{module}.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]


def run(name: str) -> dict[str, Any]:
    """The tensors that a case returns."""
    module, _, function = name.partition(".")
    found: dict[str, Any] = getattr(import_module(module), function)()
    return found
