"""``lentando doctor``: what is wrong when a way to start a job does not work.

Each rank collects what it can tell without joining the job (``facts``), and leaves all that may hang, crash or end the
process to a second process of its own (``probe``), which it watches (``joining``). ``checks`` and ``networks`` judge,
``page`` prints.
"""
