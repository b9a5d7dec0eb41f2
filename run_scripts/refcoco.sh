#!/usr/bin/env bash
# Grounding from data to report: scenes and a phrase for an object -> teacher -> student -> its box.
#
#   bash run_scripts/refcoco.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/refcoco.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe refcoco "$@"
