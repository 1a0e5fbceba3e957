"""What is written once for all frameworks: arguments of methods, and how they are shown."""

import inspect
from typing import TypedDict, get_type_hints

import pytest

from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.methods import (
    AdaCommArguments,
    DiLoCoArguments,
    SettingsArguments,
    SlowMoArguments,
    adacomm,
    diloco,
    slowmo,
)
from lentando.optimizers.rules.settings import Settings


@pytest.mark.parametrize(
    ("build", "keywords"),
    [
        (Settings, SettingsArguments),
        (slowmo, SlowMoArguments),
        (diloco, DiLoCoArguments),
        (adacomm, AdaCommArguments),
    ],
)
def test_typed_keywords_are_the_arguments_of_the_function_that_documents_them(build: type, keywords: type) -> None:
    parameters = inspect.signature(build).parameters
    types = get_type_hints(build)
    assert {name: types[name] for name in parameters} == get_type_hints(keywords)
    assert not keywords.__required_keys__  # type: ignore[attr-defined]
    documentation = inspect.getdoc(build) or ""
    assert [name for name in parameters if f"\n    {name}: " not in documentation] == []


def test_a_keyword_of_the_settings_that_a_method_does_not_take_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"^diloco\(\) got an unexpected keyword argument 'exact_average'$"):
        diloco(exact_average=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'interval'"):
        adacomm(interval=60.0)  # type: ignore[call-arg]


def test_arguments_that_the_other_callable_lacks_are_an_error() -> None:
    class Wrong(TypedDict, total=False):
        pace: int

    with pytest.raises(TypeError, match=r"has no arguments \['pace'\]"):

        @takes_arguments_of(slowmo, Wrong)
        def wrap(**wrong: int) -> None:
            """Wraps."""
