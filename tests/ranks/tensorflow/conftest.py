"""What tests of TensorFlow on several ranks share."""

import pytest
from case_selection import selected_cases


@pytest.fixture(scope="session", autouse=True)
def graphs_that_are_not_optimized() -> None:
    """TensorFlow takes longer to optimize a graph than these tests to run it. Jobs of ``tests/tensorflow`` do both."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": selected_cases(True, False)})


@pytest.fixture(scope="module", autouse=True)
def layers_that_are_numbered_alike() -> None:
    """Keras numbers layers over all models of a process, of which some files make more on one rank than on others."""
    import keras

    keras.utils.clear_session(free_memory=False)
