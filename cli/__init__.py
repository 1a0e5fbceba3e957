"""The command ``lentando``. One file per command; ``app`` puts them together.

Importing this package, and starting a command that does not need them, loads no framework and no MPI.
"""

__all__ = ["main"]

if __name__ == "cli":
    raise ImportError("import lentando.cli, not cli: a second copy of this package would not share its state")


def main() -> int:
    """Run the command line of this process; returns the exit status."""
    from lentando.cli.app import run

    return run()
