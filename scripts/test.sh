#!/bin/sh
# Install into .venv, where requirements.txt or pyproject.toml has changed, and run every check: bash scripts/test.sh
# Further words go to pytest: bash scripts/test.sh tests/losses -k kd
set -eu
case ${1-} in -h | --help) exec sed -n '2,/^set/s/^# //p' "$0" ;; esac
cd -- "$(dirname -- "$(readlink -f -- "$0")")/.."
[ -f requirements.txt ] || { echo "error: $0 does not find its repository: call it by its path" >&2; exit 2; }
.venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear .venv
wanted=$(cat requirements.txt pyproject.toml)
if [ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test]'
  printf '%s\n' "$wanted" >.venv/installed
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/shellcheck scripts/*.sh .ci/run
OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist worksteal "$@" # a process for each core, of one thread
