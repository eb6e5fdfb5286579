"""``python -m flowback`` is the command ``flowback``."""

import sys

from flowback.cli import main

if __name__ == "__main__":
    sys.exit(main())
