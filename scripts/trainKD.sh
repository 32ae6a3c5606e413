#!/usr/bin/env bash
# Train a student on small images, taught by a teacher: bash scripts/trainKD.sh --help
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/cifar10/train_kd.py" "$@"
