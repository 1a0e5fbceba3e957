"""``lentando doctor``: diagnosis of jobs that do not start or do not communicate.

Each rank collects facts about itself and its host without joining the job (``facts``). Everything that may hang, crash
or end the process runs in a second process (``probe``), which the rank watches (``watch``). ``checks``, ``networks``
and ``job`` turn the facts into findings, and ``page`` prints them.
"""
