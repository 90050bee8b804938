# Sourced by demo.sh and test.sh: makes .venv with the package and the extras that are named, pinned by constraints.txt.
# Installs again only when setup.cfg, constraints.txt or the extras have changed.  PYTHON=… chooses the interpreter.

ki_ds_setup() { # ki_ds_setup [EXTRAS]
    local extras=${1:+[$1]} root python candidate stamp want
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then # absent, or its making was interrupted
        for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
            if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
                python=$candidate
                break
            fi
        done
        if [ -z "${python:-}" ]; then
            echo "error: Python 3.10, 3.11 or 3.12 with venv is needed (Debian: apt-get install python3-venv)," \
                "or name one: PYTHON=/path/to/python3.11 $0" >&2
            return 2
        fi
        "$python" -m venv --clear "$root/.venv" || return 1
    fi
    stamp=$root/.venv/ki_ds$extras.stamp
    want=$(cat "$root/setup.cfg" "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing ki_ds$extras into .venv …"
        "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" --editable "$root$extras" || return 1
        echo "$want" >"$stamp"
    fi
    # shellcheck disable=SC1091
    . "$root/.venv/bin/activate"
}

ki_ds_packages() { # ki_ds_packages LIST: those of Debian's packages that are not there; never fails
    local missing=() package
    command -v dpkg-query >/dev/null || { echo "no Debian here: tests that need the programs of $1 skip"; return 0; }
    while read -r package; do
        [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done < <(sed 's/#.*//; /^ *$/d' "$1")
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "${KI_DS_APT:-}" = 1 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${missing[*]} …"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
            -qq "${missing[@]}"; } >/dev/null && return 0
        echo "could not install them (see above); tests that need them skip" >&2
    else
        echo "tests that need ${missing[*]} skip; to install: apt-get install ${missing[*]} (or as root: KI_DS_APT=1 $0)"
    fi
}
