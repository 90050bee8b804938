#!/usr/bin/env bash
# Installs into .venv and runs the demo: a student that inherits, beside the same student learning alone.
# Arguments go to `ki-ds demo`, for instance --masked, --workdir DIR or --set seed=2.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ki_ds_setup
ki-ds demo "$@"
