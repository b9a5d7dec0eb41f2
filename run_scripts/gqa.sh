#!/usr/bin/env bash
# Questions as in GQA from data to report: scenes and questions -> teacher -> student -> its answers.
#
#   bash run_scripts/gqa.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/gqa.yaml and config/embedded/ hold their defaults.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -d $root/.venv/bin ]] || PATH=$root/.venv/bin:$PATH
if ! command -v narvl >/dev/null; then
  echo "error: narvl is not installed; run: make setup" >&2
  exit 1
fi
exec narvl run --config-dir "$root/run_scripts/config" recipe=gqa "$@"
