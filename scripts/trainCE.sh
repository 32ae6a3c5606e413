#!/usr/bin/env bash
# Train a network on small images by cross-entropy: bash scripts/trainCE.sh --help
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" cifar10/train_ce.py "$@"
