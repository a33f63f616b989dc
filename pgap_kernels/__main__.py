"""``python -m pgap_kernels``: the same as the ``pgap-kernels`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
