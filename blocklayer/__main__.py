"""``python -m blocklayer``."""

import sys

from blocklayer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
