"""The model of a distributed optimizer as users pass it: by name, and of the class that the framework's models have."""

from typing import Any

from lentando.comm.errors import ConfigurationError

__all__ = ["check_model", "not_by_name"]


def check_model(model: Any, kind: type, kind_name: str) -> None:
    """Check that the argument ``model`` is a model.

    Args:
        model: what was passed, None if nothing was.
        kind: class of the framework's models.
        kind_name: name of the class, as users write it.

    Raises:
        ConfigurationError: if it is anything else.
    """
    if model is None or isinstance(model, kind):
        return
    found = f"the class {model.__name__} itself" if isinstance(model, type) else type(model).__name__
    raise ConfigurationError(f"model= must be the {kind_name} that this optimizer trains, or be left out, got {found}")


def not_by_name(name: str, expected: str, found: Any) -> ConfigurationError:
    """The error about the argument that follows the base optimizer, in whose place a model may have been passed.

    Args:
        name: name of the argument.
        expected: what it must be.
        found: what was passed.
    """
    return ConfigurationError(
        f"{name} must be {expected}, got {type(found).__name__}. A model is passed by its name: model=model"
    )
