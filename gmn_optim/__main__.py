"""``python -m gmn_optim`` is the command line."""

import sys

from gmn_optim.cli import main

sys.exit(main())
