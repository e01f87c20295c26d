#!/bin/sh
# Make .venv and install quantkit, with what `make demo` shows, in the versions of constraints.txt. Called by make.
set -eu
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "quantkit needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON=/path/to/python3." >&2
    exit 2
}
"$python" -m venv .venv || {
    echo "'$python -m venv' does not work here; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 2
}
pip=".venv/bin/python -m pip install --disable-pip-version-check --quiet"
torch=$(grep '^torch==' constraints.txt)
# PyPI's Linux build of torch brings gigabytes of CUDA. The CPU build lies on PyTorch's own index.
if [ "$(uname)" = Linux ] && [ -z "${QUANTKIT_CUDA:-}" ]; then
    $pip --no-deps --retries 1 --timeout 20 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null ||
        echo "PyTorch's CPU index is not reachable: taking $torch from the default index" >&2
fi
# A torch with CUDA asks for the Triton it was built with; beside the CPU build the tests take that of constraints.txt.
grep -v '^triton==' constraints.txt > .venv/constraints.txt
$pip --constraint .venv/constraints.txt "$torch"
.venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(any(r.startswith("triton") for r in m.requires("torch") or ()))' &&
    cp constraints.txt .venv/constraints.txt
$pip --constraint .venv/constraints.txt --editable '.[report]'
