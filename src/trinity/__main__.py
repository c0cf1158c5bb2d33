"""`python -m trinity`: the command line, for launchers that start modules."""

import sys

from trinity.cli.main import main

sys.exit(main())
