#!/usr/bin/env bash
# Train a student on small images, taught by a teacher: bash scripts/trainKD.sh --help
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" cifar10/train_kd.py "$@"
