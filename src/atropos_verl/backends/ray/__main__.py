"""``python -m atropos_verl.backends.ray``: the same as ``main_atropos.py backend=ray``."""

import sys

from atropos_verl.backends.ray.main import main

if __name__ == "__main__":
    sys.exit(main())
