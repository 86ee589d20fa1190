#!/bin/bash
# One SLURM job: the first node holds trajectory API and trainer, the other nodes the environments.
#
#   sbatch --nodes=3 recipe/atropos/slurm/train.sh model.path=/models/mine batch_size=512 trainer_process.nproc=8
#
# Words of the command line go to every part. From the environment of sbatch:
#   RUN           directory on a file system that all nodes share (runs/job-NAME); the next job of that name goes on
#   TRAIN_CONFIG  configuration of API and trainer (multi_gpu)       ENV_CONFIG  of the environments (two_environments)
#   API_PORT, GATEWAY_PORT  on the first node (8000, 9004)           VENV        virtual environment (.venv)
#SBATCH --job-name=atropos-verl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@300
# Five minutes before the time limit the trainer writes a checkpoint.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
# shellcheck disable=SC1091
[ ! -e "${VENV:-.venv}/bin/activate" ] || source "${VENV:-.venv}/bin/activate"

RUN=${RUN:-$PWD/runs/job-${SLURM_JOB_NAME:-atropos-verl}}
API_PORT=${API_PORT:-8000}
GATEWAY_PORT=${GATEWAY_PORT:-9004}
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES[0]}
if [ "${#NODES[@]}" -lt 2 ]; then
    echo "this job has one node; give it two, or start launch_atropos_verl.py by itself, which needs no more" >&2
    exit 2
fi

# Keys for the network, made once, in files of ours alone; they reach every part by environment variable.
mkdir -p "$RUN"
for name in gateway_key api_token; do
    [ -s "$RUN/$name" ] || (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$RUN/$name")
done
ATROPOS_GATEWAY_KEY=$(cat "$RUN/gateway_key")
ATROPOS_API_TOKEN=$(cat "$RUN/api_token")
export ATROPOS_GATEWAY_KEY ATROPOS_API_TOKEN

launch=(python recipe/atropos/launch_atropos_verl.py)
parts=()
on() { # on NODE WORDS...: start a part there
    srun --nodes=1 --ntasks=1 --nodelist="$1" "${launch[@]}" "${@:2}" &
    parts+=($!)
}

on "$HEAD" --config-name "${TRAIN_CONFIG:-multi_gpu}" 'only=[api,trainer]' "run_dir=$RUN/train" \
    api.host=0.0.0.0 "api.port=$API_PORT" \
    gateway.host=0.0.0.0 "gateway.port=$GATEWAY_PORT" "gateway.advertise_url=http://$HEAD:$GATEWAY_PORT" "$@"
for node in "${NODES[@]:1}"; do
    on "$node" --config-name "${ENV_CONFIG:-two_environments}" 'only=[environments]' "run_dir=$RUN/environments-$node" \
        "atropos.api_url=http://$HEAD:$API_PORT" "gateway.advertise_url=http://$HEAD:$GATEWAY_PORT" "$@"
done

stop() { kill -TERM "${parts[@]}" 2> /dev/null || true; }
trap stop TERM INT
# A signal ends `wait` early, with a code above 128, while the trainer still writes its checkpoint: wait on.
code=0
wait "${parts[0]}" || code=$?
while kill -0 "${parts[0]}" 2> /dev/null; do
    code=0
    wait "${parts[0]}" || code=$?
done
stop
wait
exit "$code"
