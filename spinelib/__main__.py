"""``python -m spinelib`` is the command ``spinelib``."""

import sys

from spinelib.cli import main

if __name__ == "__main__":
    sys.exit(main())
