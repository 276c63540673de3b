#!/bin/sh
# Prints the first Python on PATH that can run mlxd (PYTHON, if set, is the only one tried),
# or says on stderr what to install and exits 1.
# ensurepip is asked for as well: Debian ships venv without it, and then `python3 -m venv` fails halfway.
# MLX has no wheels for Intel Macs, nor for an Intel Python under Rosetta.
check='import sys, platform, venv, ensurepip
sys.exit(sys.version_info < (3, 11) or (sys.platform == "darwin" and platform.machine() != "arm64"))'

for python in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}; do
    if "$python" -c "$check" >/dev/null 2>&1; then
        command -v "$python"
        exit 0
    fi
done

if [ "$(uname -s)" = Darwin ]; then
    install="brew install python@3.12"
else
    install="apt install python3 python3-venv"
fi
if [ -n "$PYTHON" ]; then
    echo "Error: PYTHON=$PYTHON is not a Python 3.11 or newer with venv; leave PYTHON out, or install one: $install" >&2
elif [ "$(uname -sm)" = "Darwin x86_64" ]; then
    echo "Error: mlxd needs an Apple-silicon Mac and a terminal that does not run under Rosetta." >&2
else
    echo "Error: mlxd needs Python 3.11 or newer with venv; install it with: $install" >&2
fi
exit 1
