#!/bin/sh
# A newer transformers beside the one of constraints.txt: scripts/transformers_env.sh DIR. All other packages are .venv's.
set -eu
folder=${1:?usage: scripts/transformers_env.sh DIR}
version=5.24.0
.venv/bin/python -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The folder's own packages come before those that this adds.
.venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > "$site/shared.pth"
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target "$site" "transformers==$version"
"$folder/bin/python" -c "import sys, transformers; print(transformers.__version__); sys.exit(transformers.__version__ != '$version')"
