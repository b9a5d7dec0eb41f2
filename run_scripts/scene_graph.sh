#!/usr/bin/env bash
# Scene graphs from data to report: scenes and their triplets -> teacher -> student -> the graph of an image.
#
#   bash run_scripts/scene_graph.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/scene_graph.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe scene_graph "$@"
