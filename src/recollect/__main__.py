"""``python -m recollect``, as ``torchrun -m recollect`` calls it."""

import sys

from recollect.cli import main

sys.exit(main())
