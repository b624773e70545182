"""`python -m digit` is `digit`."""

import sys

from digit.cli import main

sys.exit(main())
