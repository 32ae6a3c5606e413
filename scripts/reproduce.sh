#!/usr/bin/env bash
# Train what the results table lacks, and write the table: bash scripts/reproduce.sh cifar10 [flags]
#   --budget full|short  full: the mission's table, for a GPU; short: a table that 2 CPU cores fill in hours (default: full)
#   --seeds N            students of seeds 0 to N-1 (default: 3; short: 1); teachers have seed 0
#   --only ROW           that run and what it needs: teacher-ARCH, student, student-kd-ARCH, student-kd-ARCH-finetuned
#   --data DIR           as for trainKD.sh; other flags are passed on to every run: --device, --precision, ...
# Called again, it continues what was cut and passes by what is done. NPROC and NNODES as for trainKD.sh.
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
fail() {
  echo "error: $*" >&2
  exit 2
}
case ${1:-} in
  cifar10) shift ;;
  -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  *) fail "bash scripts/reproduce.sh cifar10 [flags]: the table of ${1:-no data set} is not known; --help says more" ;;
esac
budget=full seeds='' only='' more=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) exec bash "${BASH_SOURCE[0]}" --help ;;
    --budget | --seeds | --only) [ $# -gt 1 ] || fail "$1 wants a value" ;;&
    --budget) budget=$2 && shift 2 ;;
    --seeds) seeds=$2 && shift 2 ;;
    --only) only=$2 && shift 2 ;;
    *) more+=("$1") && shift ;;
  esac
done
case $budget in
  full) teachers=(resnet152 densenet40 resnext29_32x8d) seeds=${seeds:-3} teacher=teacher student=long_student ;;
  short) teachers=(resnet18) seeds=${seeds:-1} teacher=short_teacher student=short_student ;;
  *) fail "--budget must be full or short, got $budget" ;;
esac
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds must be an integer, at least 1, got $seeds"
runs=${DISTILL_CHECKPOINTS:-$here/../checkpoints}/cifar10-$budget
mkdir -p "$runs"

wanted() { # whether a run, or one of those that need it, was asked for
  local row
  [ -n "$only" ] || return 0
  for row in "$@"; do
    if [ "$row" = "$only" ]; then return 0; fi
  done
  return 1
}
results() {
  NNODES=1 NPROC=1 bash "$here/launch.sh" scripts/results.py "$@"
}
run() { # ROW SEED LAUNCHER flags: its directory, its command
  local name=$1-seed$2 launcher=$3
  shift 3
  echo "== $name"
  bash "$here/$launcher" --output "$runs/$name" "$@" ${more[@]+"${more[@]}"}
  results --record "$budget" "$runs/$name"
}
known=(student)
for arch in "${teachers[@]}"; do
  known+=("teacher-$arch" "student-kd-$arch" "student-kd-$arch-finetuned")
done
[ -z "$only" ] || case " ${known[*]} " in
  *" $only "*) ;;
  *) fail "--only must be one of ${known[*]}, got $only" ;;
esac
for arch in "${teachers[@]}"; do
  if wanted "teacher-$arch" "student-kd-$arch" "student-kd-$arch-finetuned"; then
    run "teacher-$arch" 0 trainCE.sh --recipe "$teacher" --arch "$arch"
  fi
done
for ((seed = 0; seed < seeds; seed++)); do
  if [[ -z $only || $only = student || $only = *-finetuned ]]; then
    run student "$seed" trainCE.sh --recipe "$student" --seed "$seed"
  fi
  for arch in "${teachers[@]}"; do
    taught=(trainKD.sh --teacher-arch "$arch" --teacher-checkpoint "$runs/teacher-$arch-seed0/last.pt" --seed "$seed")
    if wanted "student-kd-$arch"; then
      run "student-kd-$arch" "$seed" "${taught[@]}" --recipe "${student}_kd"
    fi
    if wanted "student-kd-$arch-finetuned"; then
      start=$runs/student-seed$seed/last.pt
      run "student-kd-$arch-finetuned" "$seed" "${taught[@]}" --recipe "${student}_finetune_kd" --init "$start"
    fi
  done
done
results
