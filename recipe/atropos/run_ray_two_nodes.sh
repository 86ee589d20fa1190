#!/usr/bin/env bash
# Two machines. On the first: `ray start --head --port=6379`; on the second: `ray start --address=FIRST:6379`; then this
# on the first. Every machine needs this package and the model at the same path, and a run_dir that both can read.
# MODEL; ATROPOS_API_URL (or ENV_SCRIPT); GATEWAY_URL: how environments reach port 9004 of the machine that Ray puts the
# task runner on; ATROPOS_GATEWAY_KEY: the key that they send.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${ATROPOS_GATEWAY_KEY:?set ATROPOS_GATEWAY_KEY: the gateway listens on every interface}"

${PYTHON:-python} recipe/atropos/main_atropos.py backend=ray --config-name ray_two_nodes \
    actor_rollout_ref.model.path="${MODEL:?set MODEL to a model directory}" \
    atropos.env.script="${ENV_SCRIPT:-null}" \
    atropos.gateway.advertise_url="${GATEWAY_URL:-null}" \
    trainer.nnodes=2 \
    trainer.n_gpus_per_node="${GPUS:-8}" \
    data.train_batch_size=256 \
    trainer.total_training_steps=1000 \
    "$@"
