#!/usr/bin/env bash
# Installs into .venv, checks style and types, and runs the tests: all but the slow ones, or with --all first, all.
# Further arguments go to pytest, for instance -m "not launch and not slow" for the fast part, or -k NAME.
# KI_DS_APT=1, as root on Debian: installs the packages of apt.txt first, so that no test skips for want of them.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
chosen=(-m "not slow")
if [ "${1:-}" = --all ]; then
    chosen=()
    shift
fi
ki_ds_setup test
cd "$(dirname "$0")/.."
ki_ds_packages runners/apt.txt
ruff check .
ruff format --check .
mypy ki_ds
case " $* " in
*gpu*) ;;
*) export CUDA_VISIBLE_DEVICES= ;; # the tests that are not marked gpu expect none
esac
# a file at a time on each of two processes: files share what they have trained
exec pytest -n 2 --dist loadfile "${chosen[@]}" "$@"
