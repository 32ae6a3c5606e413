#!/bin/sh
# Run a Python file of this repository, in one process or in many: bash scripts/launch.sh FILE [flags]
# NPROC processes (auto: one a GPU, or a core) on each of NNODES machines; this machine is number NODE_RANK of them, and
# 0 is at MASTER_ADDR:MASTER_PORT. MAX_RESTARTS: how often all of them are started again when one dies; they continue
# from the checkpoint.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
file=$root/$1
shift
[ "${NNODES:-1}/${NPROC:-1}/${MAX_RESTARTS:-0}" != 1/1/0 ] || exec "$python" "$file" "$@"

case " $* " in *" --help "* | *" -h "* | *" --show-recipe "*) exec "$python" "$file" "$@" ;; esac
"$python" "$file" "$@" --show-recipe >/dev/null # a wrong flag is told once, before there are many processes
exec "$python" "$root/scripts/torchrun.py" "$file" "$@"
