"""Settings as manifests of versions 1 and 2 hold them: as the text of a Python call, which is parsed, never evaluated.

Such as ``Settings(base=SGP(topology=Ring()), outer=None, period=12, ...)``.
"""

import ast
import re
from typing import Any

from lentando.comm.errors import CheckpointError
from lentando.optimizers.rules.describe import CLASS, UNKNOWN, describe
from lentando.optimizers.rules.settings import DESCRIPTION_VERSION

__all__ = ["settings_from_text"]

CHECKSUM = re.compile(r"\b(FromMatrix|FromGraph)\(([0-9a-f]{8})\)")
"""Topologies whose text was a checksum, which is no Python."""

NOT_FINITE = ("inf", "nan")

RENAMED = {("Settings", "algorithm", "engine"): "backend", ("AllReduce", "algorithm", "engine"): "backend"}
"""Values that have another name now, by class, field and the name that was recorded."""


def settings_from_text(text: str) -> dict[str, Any]:
    """The settings as data, like ``Settings.method``.

    Fields that were omitted because they had their defaults are missing. Of an object of a user's own class that was
    no dataclass, only the class was recorded.

    Args:
        text: from a manifest.

    Raises:
        CheckpointError: if an object wrote a ``repr`` of its own that is no call with keywords.
    """
    try:
        settings = _data(ast.parse(CHECKSUM.sub(r"\1(checksum='\2')", text), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            "its settings were recorded by an earlier version, as text that cannot be compared with those here "
            f"({error}): resume it with the Lentando that wrote it. The text is {text}"
        ) from error
    return {"version": DESCRIPTION_VERSION, **{key: value for key, value in settings.items() if key != CLASS}}


def _data(node: ast.expr) -> Any:
    """What ``describe`` returns for the object that a piece of the text stands for."""
    match node:
        case ast.Constant(value=value):
            return describe(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return describe(-value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return "-inf"
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return [_data(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {str(ast.literal_eval(key)): _data(item) for key, item in zip(keys, values, strict=True) if key}
        case ast.Name(id=name):
            return name if name in NOT_FINITE else {CLASS: name, UNKNOWN: True}
        case ast.Call(func=ast.Name(id="FixedPeriod"), args=[], keywords=[ast.keyword(arg="period", value=period)]):
            return _data(period)
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords) if all(word.arg for word in keywords):
            data = {str(word.arg): _data(word.value) for word in keywords}
            renamed = {key: new for (kind, key, old), new in RENAMED.items() if kind == name and data.get(key) == old}
            return {CLASS: name, **data, **renamed}
        case ast.Call(func=ast.Attribute(value=ast.Name(id="np")), args=[number], keywords=[]):  # np.float64(0.5)
            return _data(number)
    raise ValueError(f"what {ast.unparse(node)!r} stands for is not known")
