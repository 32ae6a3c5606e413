#!/bin/sh
# From nothing to a distilled student, in minutes on two CPU cores: bash scripts/quickstart.sh
# Installs requirements.txt into .venv, trains EfficientNet-B0 alone, and taught by an airbench94 that comes with this
# repository, on the embedded sample of CIFAR-10, prints one table, and writes a page on both. A second call continues or
# reports.
set -eu
case ${1-} in
  "") ;;
  -h | --help) exec sed -n '2,/^set/s/^# //p' "$0" ;;
  *) echo "error: $1: quickstart.sh takes no flags; scripts/trainKD.sh does" >&2; exit 2 ;;
esac
cd -- "$(dirname -- "$(readlink -f -- "$0")")/.."
[ -f requirements.txt ] || { echo "error: $0 does not find its repository: call it by its path" >&2; exit 2; }
.venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[report]'

runs=${DISTILL_CHECKPOINTS:-checkpoints}/quickstart
run() { # name, launcher, flags: the runs stand side by side, whatever else was trained on the sample
    name=$1 launcher=$2
    shift 2
    echo "== $name"
    bash "scripts/$launcher" --data sample --recipe sample_student --epochs 20 --output "$runs/$name" "$@"
}
run alone trainCE.sh
run taught trainKD.sh --teacher-arch airbench94 --teacher-checkpoint published --T 4 --w 0.9

.venv/bin/python scripts/results.py "$runs/alone" "$runs/taught"
.venv/bin/python scripts/report.py "$runs/alone" "$runs/taught" -o "$runs/report.html"
