#!/usr/bin/env bash
# Train a network on small images by cross-entropy: bash scripts/trainCE.sh --help
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
exec "$python" "$root/cifar10/train_ce.py" "$@"
