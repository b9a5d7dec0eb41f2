#!/usr/bin/env bash
# Captioning from data to report: scenes -> teacher -> student -> its captions.
# With DISTIL=1, the student learns the teacher's captions.
#
#   bash run_scripts/caption.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/caption.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe caption "$@"
