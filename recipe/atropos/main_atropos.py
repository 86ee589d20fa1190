"""Train a policy on Atropos environments in verl: rollouts, updates, automatic weight sync.

python recipe/atropos/main_atropos.py                      # the demo: everything is started for you
python recipe/atropos/main_atropos.py atropos.api_url=http://localhost:8000
python recipe/atropos/main_atropos.py --help               # every key
torchrun --nproc_per_node=2 recipe/atropos/main_atropos.py # two data-parallel ranks
python recipe/atropos/main_atropos.py backend=ray          # the demo through Ray and verl's own trainer
python recipe/atropos/main_atropos.py backend=ray --help   # docs/cluster.md
"""

import sys
from pathlib import Path

_CONFIG_DIR = Path(__file__).parent / "config"


def main() -> int:
    """Dispatch on ``backend`` before anything heavy is imported."""
    chosen = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("backend=")]
    backend = chosen[-1] if chosen else "local"
    sys.argv = [word for word in sys.argv if not word.startswith("backend=")]
    if backend == "local":
        from atropos_verl.local.main import main as run

        return run(config_dir=_CONFIG_DIR, config_name="atropos")
    if backend == "ray":
        from atropos_verl.cluster.main import main as run_on_ray

        return run_on_ray(config_dir=_CONFIG_DIR, config_name="ray_cpu_demo")
    print(f"CONFIGURATION ERROR: backend: {backend!r} is neither local nor ray", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
