"""Findings about torchrun and torch.distributed, which connect ranks without an MPI."""

from pathlib import Path

from lentando.cli.doctor.facts import Facts
from lentando.cli.doctor.findings import Finding, note, ok

__all__ = ["check_torchrun", "has_gloo"]


def has_gloo(facts: Facts) -> bool:
    """Return whether ranks on CPUs can find each other by torch.distributed."""
    return bool(facts["torch"] and facts["torch"].get("backends", {}).get("gloo"))


def check_torchrun(facts: Facts) -> list[Finding]:
    """Return findings on the backends that torch.distributed has, and on the torchrun that the shell finds."""
    torch = facts["torch"]
    if torch is None:
        return []
    if "error" in torch:
        return [note("torchrun", f"torch cannot be loaded: {torch['error']}", "python -c 'import torch'")]
    backends = torch["backends"]
    there, absent = ([name for name in backends if backends[name] is built] for built in (True, False))
    if not has_gloo(facts):
        text = "torch was built without Gloo, by which torchrun's ranks communicate on CPUs"
        return [note("torchrun", text, "pip install --force-reinstall torch")]
    text = f"torch.distributed has {', '.join(there)}" + (f", and not {', '.join(absent)}" if absent else "")
    return [ok("torchrun", text), _check_program(facts)]


def _check_program(facts: Facts) -> Finding:
    """Return whether the shell's torchrun starts this Python: it starts the one that it was installed with."""
    instead = "python -m torch.distributed.run"
    if facts["torchrun"] is None:
        return ok("torchrun", f"there is no torchrun on the PATH: {instead} is the same program")
    if Path(facts["torchrun"]).resolve().parent != Path(facts["executable"]).parent.resolve():
        text = f"on the PATH is {facts['torchrun']}, of another environment: it would start the Python there"
        return note("torchrun", text, f"{facts['executable']} -m torch.distributed.run --nproc-per-node 2 train.py")
    return ok("torchrun", f"on the PATH is {facts['torchrun']}, of this environment")
