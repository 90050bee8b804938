#!/usr/bin/env bash
# Runs benchmarks/gpu.py with a Python that has a torch with CUDA already, which is left as it is.
#   ./runners/gpu.sh --wheels DIR --minutes 38      what else is needed comes from a folder of wheels, without a network
#   ./runners/gpu.sh --minutes 38                   … or is there already, or comes from the package index
# Further arguments go to benchmarks/gpu.py. PYTHON=… chooses the interpreter. How to fill DIR: docs/gpu.md.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
wheels=
if [ "${1:-}" = --wheels ]; then
    wheels=$(cd "${2:?--wheels needs a folder}" && pwd)
    shift 2
fi
"$python" -c 'import torch' 2>/dev/null || {
    echo "error: $("$python" --version 2>&1) has no torch; expected one with CUDA, or name another: PYTHON=… $0" >&2
    exit 2
}
site=$root/.gpu-site/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
pip=("$python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location --target "$site" --upgrade)
if [ -n "$wheels" ]; then
    found=()
    for wheel in "$wheels"/*.whl; do # what torch is made of stays
        case ${wheel##*/} in
        nvidia_ml_py-*) found+=("$wheel") ;;
        torch-* | triton-* | nvidia_* | cuda_* | ki_ds-* | "*.whl") ;;
        *) found+=("$wheel") ;;
        esac
    done
    [ ${#found[@]} -gt 0 ] || { echo "error: $wheels holds no wheels" >&2; exit 2; }
    "${pip[@]}" --no-index --no-deps "${found[@]}"
elif ! "$python" -m ki_ds.cli doctor >/dev/null 2>&1; then
    torch=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')
    DS_BUILD_OPS=0 "$python" -m pip install --quiet --disable-pip-version-check "$root" "torch==$torch" || {
        echo "error: what is needed beside torch $torch cannot be installed from the package index; give --wheels DIR" >&2
        exit 2
    }
fi
# the package's own metadata, by which `ki-ds doctor` knows what is needed; its code is that of this folder
"${pip[@]}" --no-index --no-deps --no-build-isolation "$root" ||
    echo "ki_ds could not be installed into $site (is setuptools there?): its source is used, doctor will say so" >&2
cd "$root"
"$python" benchmarks/gpu.py "$@"
