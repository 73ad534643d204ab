"""`python -m fscached`: the command line, for whoever starts it without the installed script."""

import sys

from fscached.cli import main

sys.exit(main())
