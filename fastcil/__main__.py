"""``python -m fastcil``."""

import sys

from fastcil.cli import main

if __name__ == "__main__":
    sys.exit(main())
