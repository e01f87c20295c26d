#!/usr/bin/env bash
# Everything that has to be asked of an H100 or H200, in at most 420 s: smoke, correctness, goals, counters, tiles, goals again.
#   make gpu-wheels                          once, where pip works: .whl goes along to a machine without a network
#   OUT=folder bash scripts/gpu_check.sh     there; what is measured lies in the folder as soon as it is
#   make gpu-results FROM=folder             puts it into bench/results, docs/gpu.md and the table of tiles
# Exit status: 0, or 1 where a test failed, or 2 where nothing can run here. LIMIT: seconds after which nothing is begun.
set -u
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-gpu-check} LIMIT=${LIMIT:-400} py=${GPU_PYTHON:-python3}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
exec > >(tee "$OUT/check.log") 2>&1
say() { printf '== %3d s: %s\n' "$SECONDS" "$*"; }
left() { echo $((LIMIT > SECONDS ? LIMIT - SECONDS : 0)); }
# within SECONDS COMMAND...: stopped then, or when LIMIT is over, whatever comes first
within() { local most=$1 rest; shift; rest=$(left); timeout -k 5 $((most < rest ? most : rest + 1)) "$@"; }

# Kernels built by an earlier run, perhaps another version of nvcc or Triton, are no part of this one.
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TRITON_CACHE_DIR=$scratch/triton XDG_CACHE_HOME=$scratch/cuda
export PYTHONPATH=$PWD
if compgen -G '.whl/*.whl' > "$scratch/wheels"; then
    xargs "$py" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" < "$scratch/wheels" ||
        { say "the wheels of .whl do not fit this Python: $("$py" --version)"; exit 2; }
    PYTHONPATH=$PWD:$scratch/site
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv,noheader
tests=("$py" -m pytest -p no:cacheprovider --tb=short)
bench=("$py" bench/gpu_kernels.py)

say "smoke: one launch of each kind"
within 90 "${tests[@]}" -x -s tests/gpu/smoke.py || { say "smoke failed: nothing else is tried"; exit 2; }

# 16 processors and one GPU: the benches compile beside the tests what they measure afterwards. Nothing is timed here.
say "correctness"
within 200 "${tests[@]}" -n 6 --durations=5 tests/gpu/kernels.py tests/gpu/attention.py tests/gpu/graphs.py tests/gpu/model.py tests/gpu/benches.py > "$scratch/small" 2>&1 & small=$!
within 240 "${tests[@]}" -n 4 --durations=5 tests/gpu/shapes.py > "$scratch/large" 2>&1 & large=$!
within 150 "${bench[@]}" --quick --rounds 1 --out "$scratch/warm.json" > /dev/null 2>&1 & quick=$!
within 200 "${bench[@]}" --tune --kind int4 --rounds 1 --out "$scratch/tune.json" > /dev/null 2>&1 & tune=$!
wait "$small"; failed=$?
cat "$scratch/small" > "$OUT/tests.log"
wait "$large" || failed=1
cat "$scratch/large" >> "$OUT/tests.log"
wait "$quick" "$tune"
grep -E '^(FAILED|ERROR)|passed|failed' "$OUT/tests.log"

say "goals, the machine to itself"
within 110 "${bench[@]}" --quick --out "$OUT/goals.json" | tail -n 60

if command -v ncu > /dev/null && [ "$(left)" -gt 100 ]; then
    say "counters of the two kernels for few tokens"
    within 60 ncu --clock-control none --section SpeedOfLight --section WarpStateStats --section SchedulerStats \
        --section Occupancy --section LaunchStats --section MemoryWorkloadAnalysis -k 'regex:decode|^kernel$' -s 4 -c 8 \
        "${bench[@]}" --model hunyuan-large --layer moe --scheme W4A16 --tokens 64 --rounds 1 --out "$scratch/counted.json" \
        > "$OUT/counters.txt" 2>&1
    grep -E 'decode|kernel \(|DRAM Throughput|Memory Throughput|Duration|No Eligible|Registers Per|Long Scoreboard' \
        "$OUT/counters.txt" | head -n 60
fi

if [ "$(left)" -gt 60 ]; then
    say "tiles"
    # What the sweep writes into the table of tiles, the last run measures.
    within 120 "${bench[@]}" --tune --apply --kind int4 --rounds 15 --out "$OUT/tune.json" | tail -n 40
fi
if [ -f "$OUT/tune.json" ] && [ "$(left)" -gt 30 ]; then
    say "goals with the new table"
    within 110 "${bench[@]}" --quick --out "$OUT/tuned.json" | tail -n 60
fi
say "end: $([ "$failed" = 0 ] && echo all tests passed || echo tests failed)"
exit $((failed != 0))
