"""Conformance suites for the seams of ``lentando.optimizers``: what every implementation must pass.

Each ``check_*`` raises ``AssertionError`` with the broken promise, what was expected and what was found. None of them
needs a test framework.
"""

from lentando.optimizers.testing.base_algorithm import check_base_algorithm
from lentando.optimizers.testing.framework import check_framework
from lentando.optimizers.testing.subject import FrameworkSubject

__all__ = ["FrameworkSubject", "check_base_algorithm", "check_framework"]
