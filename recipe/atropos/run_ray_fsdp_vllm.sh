#!/usr/bin/env bash
# FSDP2 and vLLM on the GPUs of one machine. MODEL, ENV_SCRIPT (or ATROPOS_API_URL), GPUS (default 8).
set -euo pipefail
cd "$(dirname "$0")/../.."

${PYTHON:-python} recipe/atropos/main_atropos.py backend=ray --config-name ray_multi_gpu \
    actor_rollout_ref.model.path="${MODEL:?set MODEL to a model directory}" \
    atropos.env.script="${ENV_SCRIPT:-null}" \
    trainer.n_gpus_per_node="${GPUS:-8}" \
    data.train_batch_size=128 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    trainer.total_training_steps=500 \
    "$@"
