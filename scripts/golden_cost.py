"""What `quantize` costs: `python scripts/golden_cost.py [--against OTHER_CHECKOUT]` prints processor seconds and peak
memory of the bundled model's run to W4A16 with GPTQ on one thread, as JSON.

Each run is a process of its own; seconds are those of the call, without what the import takes. With another checkout of
quantkit both are run by turns, so that what else the machine does meets both alike, and `ratio` is this one's median over
the other's, `seconds_by_pair` the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Only the public interface, so that it runs with any checkout. A small run first: what is imported late is imported by it.
RUN = """
import json, resource, sys, time
import torch, quantkit
torch.set_num_threads(1)
model, text, folder = sys.argv[1:4]
tokens = {"calibration": text, "seq_len": 256}
quantkit.quantize(model, folder + "/small", quantkit.Recipe(scheme="W8A16"), device="cpu")
begun = time.process_time()
recipe = quantkit.Recipe(scheme="W4A16", method="gptq", samples=int(sys.argv[4]), **tokens)
quantkit.quantize(model, folder + "/out", recipe, device="cpu")
seconds = time.process_time() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sums = open(folder + "/out/SHA256SUMS").read().splitlines()
shards = [line for line in sums if line.endswith(".safetensors")]
print(json.dumps({"package": quantkit.__file__, "seconds": seconds, "peak_bytes": peak, "shards": shards}))
"""


def measure(checkout: Path, samples: int) -> dict[str, Any]:
    """One run of the package in that checkout."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(f"{i} squared is {i * i}, and its cube is {i**3}." for i in range(6000)))
        arguments = [str(ROOT / "examples" / "tiny-hunyuan"), str(text), folder, str(samples)]
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", RUN, *arguments]
        done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    if not Path(result["package"]).is_relative_to(checkout):
        sys.exit(f"{result['package']} was run instead of the package in {checkout}")
    return result


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    values = {key: [run[key] for run in runs] for key in ("seconds", "peak_bytes")}
    return {**{key: statistics.median(numbers) for key, numbers in values.items()}, "all_seconds": values["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of quantkit")
    parser.add_argument("--runs", type=int, default=3, help="of each [3]")
    parser.add_argument("--samples", type=int, default=32, help="windows of 256 tokens [32]")
    given = parser.parse_args()
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(given.runs):
        ours.append(measure(ROOT, given.samples))
        if given.against:
            theirs.append(measure(given.against.resolve(), given.samples))
    report: dict[str, Any] = {"this": medians(ours)}
    if theirs:
        report["other"] = medians(theirs)
        report["ratio"] = {key: report["this"][key] / report["other"][key] for key in ("seconds", "peak_bytes")}
        report["seconds_by_pair"] = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
        report["equal_shards"] = ours[0]["shards"] == theirs[0]["shards"]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
