"""Tests that need several ranks live below ``tests/ranks``. ``test_ranks.py`` starts them under mpirun, and so can you:

mpirun -np 3 python -m pytest tests/ranks/comm

``make test`` runs two tests at a time, ``pytest -n 2``: in any order, but for those of a file that share a fixture.
"""

import os
from functools import cache
from typing import Any

import pytest

from lentando.comm.launch import detect_launch

os.environ.pop("COLUMNS", None)  # xdist tells its workers a width, to which programs that tests start would wrap pages
collect_ignore = [] if detect_launch() else ["ranks"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whoever is free takes the next test, or the next file that has a fixture of its own: jobs are started once."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares_a_fixture(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_a_fixture(file) else nodeid

    return Scheduling(config, log)
