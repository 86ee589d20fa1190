#!/usr/bin/env bash
# GRPO with LoRA on one GPU. MODEL: a Hugging Face directory; ENV_SCRIPT: an Atropos environment.
# Attach to an API that runs already with ATROPOS_API_URL; ENV_SCRIPT is then not needed.
set -euo pipefail
cd "$(dirname "$0")/../.."

${PYTHON:-python} recipe/atropos/main_atropos.py backend=ray --config-name ray_one_gpu_lora \
    actor_rollout_ref.model.path="${MODEL:?set MODEL to a model directory}" \
    atropos.env.script="${ENV_SCRIPT:-null}" \
    actor_rollout_ref.model.lora_rank=32 \
    actor_rollout_ref.model.lora_alpha=32 \
    actor_rollout_ref.actor.optim.lr=1e-5 \
    data.train_batch_size=16 \
    actor_rollout_ref.rollout.n=8 \
    trainer.total_training_steps=200 \
    "$@"
