#!/usr/bin/env bash
# Installs into .venv and runs the whole test suite. Arguments go to pytest.
# KI_DS_APT=1, as root on Debian: installs the packages of apt.txt first, so that no test skips for want of them.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ki_ds_setup test
cd "$(dirname "$0")/.."
ki_ds_packages runners/apt.txt
ruff check .
ruff format --check .
mypy ki_ds
# a file at a time on each of two processes: files share what they have trained
exec pytest -n 2 --dist loadfile "$@"
