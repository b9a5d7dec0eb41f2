#!/usr/bin/env bash
# Questions as in GQA from data to report: scenes and questions -> teacher -> student -> its answers.
#
#   bash run_scripts/gqa.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/gqa.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe gqa "$@"
