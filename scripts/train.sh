#!/bin/sh
# Train a network on photos, with --kd or --teacher-arch taught by another: bash scripts/train.sh DATA [--kd] --help
file=imagenet/train_ce.py before=
for word in "$@"; do
  case "$before $word" in
    *" --kd" | *" --teacher"[-_]arch* | "--recipe "*[-_]kd | *" --recipe="*[-_]kd) file=imagenet/train_kd.py ;;
  esac
  before=$word
done
# A link is followed. A batch system runs a copy: then the repository is where the job was submitted, or above that.
from=${SLURM_SUBMIT_DIR:-${PBS_O_WORKDIR:-${SGE_O_WORKDIR:-.}}}
for root in "$(dirname -- "$(readlink -f -- "$0")")/.." "$from" "$from/.."; do
  [ ! -f "$root/$file" ] || exec sh "$root/scripts/launch.sh" "$file" "$@"
done
echo "error: $0 does not find its repository: submit it from there, or in a script of yours call it by its path" >&2
exit 2
