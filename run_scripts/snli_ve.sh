#!/usr/bin/env bash
# Visual entailment from data to report: scenes and hypotheses -> teacher -> student -> yes, no or maybe.
#
#   bash run_scripts/snli_ve.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/snli_ve.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe snli_ve "$@"
