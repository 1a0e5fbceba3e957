"""Entry point of ``python -m lentando.cli``."""

import sys

from lentando.cli import main

if __name__ == "__main__":
    sys.exit(main())
