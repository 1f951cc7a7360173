"""python -m nestling: the command line."""

import sys

from nestling.cli import main

if __name__ == "__main__":
    sys.exit(main())
