#!/usr/bin/env bash
# Visual question answering from data to report: easy-VQA -> teacher -> student -> its answers.
#
#   bash run_scripts/vqa.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/vqa.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe vqa "$@"
