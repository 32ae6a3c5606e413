#!/usr/bin/env bash
# Run a Python file of this repository, in one process or in many: bash scripts/launch.sh FILE [flags]
# NPROC processes on each of NNODES machines; this machine is number NODE_RANK of them, 0 is at MASTER_ADDR:MASTER_PORT.
# MAX_RESTARTS: how often all of them are started again when one dies; they continue from the checkpoint.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
file=$root/$1
shift
nodes=${NNODES:-1} processes=${NPROC:-1}
[ "$nodes$processes" != 11 ] || exec "$python" "$file" "$@"

"$python" "$file" "$@" --show-recipe >/dev/null # a wrong flag is told once, before there are many processes
case " $* " in *" --help "* | *" -h "* | *" --show-recipe "*) exec "$python" "$file" "$@" ;; esac
where=(--standalone)
if [ "$nodes" != 1 ]; then
  : "${MASTER_ADDR:?the address of machine 0, since NNODES is $nodes}" "${NODE_RANK:?the number of this machine, from 0}"
  where=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
# torch 2.15 and before: with one store for all starts, a restarted process may read the address of a dead one
# (pytorch/pytorch#135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
exec "$python" "$root/scripts/torchrun.py" "${where[@]}" --nproc-per-node "$processes" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --max-restarts "${MAX_RESTARTS:-0}" "$file" "$@"
