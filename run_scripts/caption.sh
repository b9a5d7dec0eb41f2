#!/usr/bin/env bash
# Captioning from data to report: scenes -> teacher -> distilled captions -> student -> its captions.
#
#   bash run_scripts/caption.sh [KEY=value ...]
#
# --help prints the settings, and config/pipeline/caption.yaml and config/embedded/ hold their defaults.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -d $root/.venv/bin ]] || PATH=$root/.venv/bin:$PATH
if ! command -v narvl >/dev/null; then
  echo "error: narvl is not installed; run: make setup" >&2
  exit 1
fi
exec narvl run --config-dir "$root/run_scripts/config" recipe=caption "$@"
