#!/usr/bin/env bash
# Train what a table of results lacks, and write the table: bash scripts/reproduce.sh --help
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh" scripts/reproduce.py "$@"
