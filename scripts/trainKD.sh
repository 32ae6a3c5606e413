#!/bin/sh
# Train a student on small images, taught by a teacher: bash scripts/trainKD.sh --help
# A link is followed. A batch system runs a copy: then the repository is where the job was submitted, or above that.
from=${SLURM_SUBMIT_DIR:-${PBS_O_WORKDIR:-${SGE_O_WORKDIR:-.}}}
for root in "$(dirname -- "$(readlink -f -- "$0")")/.." "$from" "$from/.."; do
  [ ! -f "$root/cifar10/train_kd.py" ] || exec sh "$root/scripts/launch.sh" cifar10/train_kd.py "$@"
done
echo "error: $0 does not find its repository: submit it from there, or in a script of yours call it by its path" >&2
exit 2
