"""``python -m atropos_verl.cluster``: the same as ``main_atropos.py backend=ray``."""

import sys

from atropos_verl.cluster.main import main

if __name__ == "__main__":
    sys.exit(main())
