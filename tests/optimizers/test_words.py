"""The words of settings, by which checkpoints are continued or refused."""

from typing import Any

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.control import fingerprint
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import describe
from lentando.comm.topology import Ring
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.settings import Settings

OLD = ", outer=None, period=4, base_buffers='maintain', exact_average=True, algorithm='auto')"
BASES = [
    (AllReduce(), "AllReduce(algorithm='auto')", [AllReduce(overlap=True), AllReduce(bucket_bytes=8)]),
    (SGP(Ring()), "SGP(topology=Ring())", [SGP(Ring(), wire_dtype="bfloat16")]),
    (
        OSGP(Ring()),
        "OSGP(topology=Ring(), staleness=1, deterministic=False)",
        [OSGP(Ring(), wire_dtype="float16"), OSGP(Ring(), wire_dtype="bfloat16")],
    ),
    (DPSGD(Ring()), "DPSGD(topology=Ring())", [DPSGD(Ring(), wire_dtype="float16")]),
]


def worker(**settings: Any) -> Worker:
    constant = lambda *_: np.ones(4)  # noqa: E731 - a gradient
    return Worker(SingleTransport(), constant, np.zeros(4), lambda step: 0.1, period=4, **settings)


@pytest.mark.parametrize(("base", "words", "others"), BASES, ids=lambda value: type(value).__name__)
def test_a_state_of_before_a_choice_existed_continues_with_its_default(base: Any, words: str, others: Any) -> None:
    before = worker(base=base)
    before.run(3)
    layouts = describe(buffer.layout for buffer in before.model.buffers)
    state = {**before.replica.state_dict(), "subject": fingerprint([layouts, f"Settings(base={words}{OLD}"])}
    after = worker(base=base)
    after.replica.load_state_dict(state)
    assert after.replica.inner_steps == 3
    for other in others:
        with pytest.raises(ConfigurationError, match="cannot resume: the fingerprint of model and settings"):
            worker(base=other).replica.load_state_dict(state)


def test_between_ranks_all_is_said() -> None:
    base = AllReduce(bucket_bytes=8)
    assert "AllReduce(algorithm='auto', overlap=False, bucket_bytes=8)" in Settings(base).in_words()
    assert "AllReduce(algorithm='auto', bucket_bytes=8)" in Settings(base).method_in_words()
    assert "on_nonfinite='skip'" in Settings(base, on_nonfinite="skip").in_words()
    assert "on_nonfinite" not in Settings(base, on_nonfinite="skip").method_in_words()
