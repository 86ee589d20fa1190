"""Train a policy on Atropos environments in verl: rollouts, updates, automatic weight sync.

python recipe/atropos/main_atropos.py                      # the demo: everything is started for you
python recipe/atropos/main_atropos.py atropos.api_url=http://localhost:8000
python recipe/atropos/main_atropos.py --help               # every key
torchrun --nproc_per_node=2 recipe/atropos/main_atropos.py # two data-parallel ranks
"""

import sys
from pathlib import Path

from atropos_verl.local.main import main

if __name__ == "__main__":
    sys.exit(main(config_dir=Path(__file__).parent / "config", config_name="atropos"))
