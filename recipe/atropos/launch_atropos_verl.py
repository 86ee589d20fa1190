"""Start and watch everything of a run: trajectory API, trainer with its inference gateway, environments.

python recipe/atropos/launch_atropos_verl.py                       # the demo, on this machine's CPU
python recipe/atropos/launch_atropos_verl.py --config-name two_environments
python recipe/atropos/launch_atropos_verl.py steps=100 --dry-run   # what would be started
python recipe/atropos/launch_atropos_verl.py --help                # every key
"""

import sys

from atropos_verl.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]], "local_demo"))
