#!/usr/bin/env bash
# From nothing to a distilled student, in minutes on two CPU cores: bash scripts/quickstart.sh
# Installs requirements.txt into .venv, trains a teacher, EfficientNet-B0 alone and EfficientNet-B0 taught by it on the
# embedded sample of CIFAR-10, and prints one table. A second call continues or reports.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt

runs=${DISTILL_CHECKPOINTS:-checkpoints}/quickstart
run() { # name, launcher, flags: the three runs stand side by side, whatever else was trained on the sample
    local name=$1 launcher=$2
    shift 2
    echo "== $name"
    bash "scripts/$launcher" --data sample --output "$runs/$name" "$@"
}
run teacher trainCE.sh --recipe sample_teacher
run student_alone trainCE.sh --recipe sample_student
run student_taught trainKD.sh --recipe sample_student_kd --teacher-checkpoint "$runs/teacher/last.pt"

.venv/bin/python scripts/results.py "$runs"/{teacher,student_alone,student_taught}
