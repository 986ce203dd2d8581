"""``python -m recollect``, as ``torchrun -m recollect`` calls it."""

import sys

from recollect.cli import main

if __name__ == "__main__":
    sys.exit(main())
