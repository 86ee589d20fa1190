#!/usr/bin/env bash
# FSDP2 and SGLang on the GPUs of one machine. MODEL, ENV_SCRIPT (or ATROPOS_API_URL), GPUS (default 8).
set -euo pipefail
cd "$(dirname "$0")/../.."

${PYTHON:-python} recipe/atropos/main_atropos.py backend=ray --config-name ray_sglang \
    actor_rollout_ref.model.path="${MODEL:?set MODEL to a model directory}" \
    atropos.env.script="${ENV_SCRIPT:-null}" \
    trainer.n_gpus_per_node="${GPUS:-8}" \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    trainer.total_training_steps=500 \
    "$@"
