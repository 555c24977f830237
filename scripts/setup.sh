#!/usr/bin/env bash
# Makes the environment in $VENV and installs the project with pinned versions. Safe to run again after a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}

say() { printf '[setup] %s\n' "$*"; }

# Installs Debian packages when we may, else prints the one line to run.
need() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $*"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
    else
        say "missing: $*. Run this line, then make again:"
        say "    sudo apt-get update && sudo apt-get install -y $*"
        exit 1
    fi
}

command -v "$python" >/dev/null || need python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$("$python" --version) is too old: Python 3.11 or newer is needed. Name one: make ${MAKECMDGOALS:-demo} PYTHON=python3.12"
    exit 1
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null || need python3-venv
command -v c++ >/dev/null || need build-essential
"$python" -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    need python3-dev

[ -x "$venv/bin/python" ] || { say "environment in $venv"; "$python" -m venv "$venv"; }
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@" 2> >(grep -v 'is ignored: it is neither a file' >&2); }

# torch first and pinned: a ranged torch may pull another build, several GB larger, on a machine without a GPU.
torch=$(grep -E '^torch==' "$constraints")
say "installing $torch"
pip install "$torch"
say "installing the project and what it needs (some minutes)"
pip install -c "$constraints" -e '.[dev]'
"$venv/bin/python" -m compileall -q pipelines stages model data
touch "$venv/.installed"
say "done: $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "on", "GPU" if torch.cuda.is_available() else "CPU")')"
