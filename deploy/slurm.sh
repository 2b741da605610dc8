#!/usr/bin/env bash
# A run on Slurm; its arguments are those of launch.py. In the root of this checkout, on shared storage:
#   sbatch deploy/slurm.sh --config configs/qwen3vl_8b.yaml student=/models/... teacher=/models/...
# Each node has one role: the first runs Ray's head and the learner, the next $ROLLOUT_NODES run rollout
# actors, the rest teacher replicas. A node offers one unit of its role per GPU. VENV: the environment that
# deploy/setup.sh created.
#SBATCH --job-name=video-opd
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
PATH=${VENV:-$HOME/.venvs/video-opd}/bin:$PATH
ROLLOUT_NODES=${ROLLOUT_NODES:-1} UNITS=${UNITS:-${SLURM_GPUS_ON_NODE:-1}} PORT=${PORT:-6379}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#nodes[@]} < ROLLOUT_NODES + 2)); then
  echo "error: ${#nodes[@]} nodes: 1 for the learner, ROLLOUT_NODES=$ROLLOUT_NODES and at least" \
    "1 for teachers are needed, ask for $((ROLLOUT_NODES + 2)) with --nodes" >&2
  exit 2
fi

# This job's own token, in a file that the nodes share.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/.ray_token_$SLURM_JOB_ID
export RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1
export RAY_prestart_worker_first_driver=0  # a process for each CPU, which nothing would use
steps=() run=
# shellcheck disable=SC2329  # the trap calls it
clean() {
  trap - EXIT
  rm -f "$RAY_AUTH_TOKEN_PATH"
  ((${#steps[@]} == 0)) || kill "${steps[@]}" 2>/dev/null || true
  wait
}
trap clean EXIT
# A stopped run writes a checkpoint and exits with code 143.
trap 'if [ -n "$run" ]; then kill -TERM "$run"; else exit 143; fi' TERM INT
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

start_ray() { # NODE ROLE ray start's further arguments
  srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --overlap --nodelist="$1" \
    ray start --block --disable-usage-stats --metrics-export-port=8080 --temp-dir="/tmp/ray_$SLURM_JOB_ID" \
    --resources="{\"$2\": $UNITS}" "${@:3}" &
  steps+=($!)
}

head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname -I | awk '{print $1}')
start_ray "${nodes[0]}" learner --head --node-ip-address="$head_ip" --port="$PORT" --dashboard-host=127.0.0.1
until ray status --address "$head_ip:$PORT" > /dev/null 2>&1; do
  if ! kill -0 "${steps[0]}" 2> /dev/null || ((SECONDS > 300)); then
    echo "error: Ray's head did not start on ${nodes[0]}: see above" >&2
    exit 1
  fi
  sleep 2
done
for ((i = 1; i < ${#nodes[@]}; i++)); do
  if ((i <= ROLLOUT_NODES)); then role=rollout; else role=teacher; fi
  start_ray "${nodes[i]}" "$role" --address="$head_ip:$PORT"
done

python launch.py --address "$head_ip:$PORT" "$@" & # it waits for nodes that have not joined yet
run=$!
code=0
while kill -0 "$run" 2> /dev/null; do # a signal ends `wait`, not the run
  wait "$run" && code=0 || code=$?
done
exit "$code"
