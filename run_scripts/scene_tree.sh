#!/usr/bin/env bash
# Scene trees from data to report: scenes and their trees -> teacher -> student -> the tree of an image.
#
#   bash run_scripts/scene_tree.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/scene_tree.yaml and config/embedded/ hold their defaults.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_recipe scene_tree "$@"
