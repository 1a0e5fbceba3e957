"""Tests that need several ranks live below ``tests/ranks``. ``test_ranks.py`` starts them under mpirun, and so can you:

mpirun -np 3 python -m pytest tests/ranks/comm
"""

from lentando.comm.launch import detect_launch

collect_ignore = [] if detect_launch() else ["ranks"]
