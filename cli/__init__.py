"""The command ``lentando``. One file per command; ``app`` combines them.

Neither this package nor a command that does not need them loads a framework or MPI.
"""

__all__ = ["main"]

if __name__ == "cli":
    raise ImportError("import lentando.cli, not cli: a second copy of this package would not share its state")


def main() -> int:
    """Run the command line of this process and return the exit status."""
    from lentando.cli.app import run

    return run()
