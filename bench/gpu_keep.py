"""Puts what scripts/gpu_check.sh measured on a GPU into this repository: python bench/gpu_keep.py FOLDER (make gpu-results).

The goals go to results/gpu_<gpu>.json, as measured with the table of tiles that the sweep made, if that run was completed;
the table goes to quantkit/kernels/triton/tiles.py; docs/gpu.md is written anew.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["TILES", "apply", "keep", "slug"]

ROOT = Path(__file__).resolve().parent.parent
TILES = ROOT / "quantkit" / "kernels" / "triton" / "tiles.py"


def slug(gpu: str) -> str:
    """A GPU's name in the name of a file."""
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-")


def apply(table: str, sizes: dict[str, float], path: Path) -> None:
    """Puts a table of tiles, as source, and sizes such as SCRATCH_FROM into a file such as TILES.

    Raises ValueError if the file lacks one of them.
    """
    text, seen = re.subn(r"^TABLE: .*?^}$", lambda _: table, path.read_text("utf-8"), count=1, flags=re.M | re.S)
    for name, value in sizes.items():
        text, more = re.subn(rf"^{name} = [\d.]+", f"{name} = {value}", text, count=1, flags=re.M)
        seen += more
    if seen != 1 + len(sizes):
        raise ValueError(f"{path} has no TABLE, or not all of {', '.join(sizes)}")
    path.write_text(text, "utf-8")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # a run that was stopped while it wrote
        return None


def keep(folder: Path, results: Path, tiles: Path) -> list[str]:
    """Copies a folder's measurements to `results` and its table to `tiles`; says what became of each. Raises ValueError
    where there is nothing to keep."""
    goals, tuned, sweep = (_read(folder / f"{name}.json") for name in ("goals", "tuned", "tune"))
    if not goals or not goals["rows"]:
        raise ValueError(f"{folder}/goals.json has no measurements: check.log says where the run ended")
    best = tuned if tuned and tuned["complete"] else goals
    if best["gpu"] != goals["gpu"]:
        raise ValueError(f"{folder} mixes {goals['gpu']} and {best['gpu']}")
    to = results / f"gpu_{slug(goals['gpu'])}.json"
    to.write_text(json.dumps({**best, "tuned": best is tuned}, indent=1) + "\n", "utf-8")
    said = [f"{to}: {len(best['rows'])} rows, {'whole' if best['complete'] else 'not whole'}, {len(best['failed'])} failed"]
    if best is tuned:
        apply(sweep["table"], sweep["sizes"], tiles)
        said.append(f"{tiles}: the table that was measured")
    return said


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folder: Path) -> None:
    """Keep what scripts/gpu_check.sh left in FOLDER."""
    try:
        said = keep(folder, ROOT / "bench" / "results", TILES)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join(said))
    subprocess.run([sys.executable, str(ROOT / "scripts" / "gpu_doc.py")], check=True)


if __name__ == "__main__":
    main()
