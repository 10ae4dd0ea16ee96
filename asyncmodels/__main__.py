"""``python -m asyncmodels`` is the command ``asyncmodels``."""

import sys

from asyncmodels.cli import main

if __name__ == "__main__":
    sys.exit(main())
