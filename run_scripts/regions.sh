#!/usr/bin/env bash
# Sets of regions from data to report: scenes and a phrase for any objects -> teacher -> student -> all their boxes.
#
#   bash run_scripts/regions.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/regions.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe regions "$@"
