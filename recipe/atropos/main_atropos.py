"""Train a policy on Atropos environments in verl: rollouts, updates, automatic weight sync.

python recipe/atropos/main_atropos.py                      # the demo: everything is started for you
python recipe/atropos/main_atropos.py atropos.api_url=http://localhost:8000
python recipe/atropos/main_atropos.py --help               # every key
torchrun --nproc_per_node=2 recipe/atropos/main_atropos.py # two data-parallel ranks
python recipe/atropos/main_atropos.py backend=ray          # the demo through Ray and verl's own trainer
python recipe/atropos/main_atropos.py backend=ray --help   # docs/cluster.md
"""

import sys

from atropos_verl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], "atropos"))
