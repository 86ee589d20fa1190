#!/usr/bin/env bash
# The demo through Ray and verl's V1 trainer on this machine's CPU: two cores, 5 GB of memory, about two minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

${PYTHON:-python} recipe/atropos/main_atropos.py backend=ray --config-name ray_cpu_demo \
    trainer.total_training_steps=30 \
    data.train_batch_size=8 \
    actor_rollout_ref.rollout.n=8 \
    "$@"
