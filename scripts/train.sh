#!/usr/bin/env bash
# Train a network on photos, with --kd or --teacher-arch taught by another: bash scripts/train.sh DATA [--kd] --help
file=imagenet/train_ce.py before=
for word in "$@"; do
  case "${before//_/-} ${word//_/-}" in
    *" --kd" | *" --teacher-arch"* | "--recipe "*-kd | *" --recipe="*-kd) file=imagenet/train_kd.py ;;
  esac
  before=$word
done
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" "$file" "$@"
