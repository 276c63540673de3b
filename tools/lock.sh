#!/bin/sh
# Remakes requirements/*.txt from pyproject.toml: names, versions and hashes for every platform, no address.
# Versions already locked stay while they satisfy pyproject.toml; `tools/lock.sh --upgrade` takes the newest.
# Needs uv and a Python >= 3.11 (PYTHON, default python3).
set -eu
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "Error: making the locks needs uv; install it with: pipx install uv" >&2; exit 1; }

lock() { # lock NAME INPUT [uv's options]: writes requirements/NAME.txt
    name=$1
    input=$2
    shift 2
    uv pip compile "$input" "$@" --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --no-header --no-annotate --output-file "requirements/$name.txt" >/dev/null
    { echo "# Made by \`make lock\` from pyproject.toml."; cat "requirements/$name.txt"; } >"$work/locked"
    cat "$work/locked" >"requirements/$name.txt"
}

listed() { # listed DOTTED.KEY: the requirements under that key of pyproject.toml, one a line
    "${PYTHON:-python3}" - "$1" <<'END'
import sys, tomllib
value = tomllib.load(open("pyproject.toml", "rb"))
for key in sys.argv[1].split("."):
    value = value[key]
print("\n".join(value))
END
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/cuda13.in" <<'END'
mlx[cuda13]>=0.32.1; sys_platform == 'linux'
mlx>=0.32.1; sys_platform == 'darwin'
END
# selenium wants trio for a part that the tests do not use; where trio is installed, huggingface_hub's client imports it, 90 ms a start.
cat >"$work/without.in" <<'END'
trio; python_version < '3'
trio-websocket; python_version < '3'
END
listed build-system.requires >"$work/build.in"
listed project.optional-dependencies.test >"$work/test.in"

mkdir -p requirements
lock run pyproject.toml "$@"
# mlx-cpu and mlx-cuda-13 both bring libmlx.so: two locks, one or the other.
lock cuda13 pyproject.toml --overrides "$work/cuda13.in" --constraints requirements/run.txt "$@"
lock build "$work/build.in" --constraints requirements/run.txt "$@"
lock test "$work/test.in" --overrides "$work/without.in" --constraints requirements/run.txt --constraints requirements/build.txt "$@"

if grep -n -e '//' -e '@ ' -e '^-' requirements/*.txt; then
    echo "Error: an address or an option got into a lock file (above)" >&2
    exit 1
fi
wc -l requirements/*.txt
