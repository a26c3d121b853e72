"""The entry point of `python -m swamp_fast`."""

import sys

from swamp_fast.cli import main

sys.exit(main())
