"""Write docs/engine-results.md's table of what engines do with quantkit's outputs, from what `make engine-test` measured."""

from __future__ import annotations

from typing import Any

from measured import ROOT, between, read

PAGE = ROOT / "docs" / "engine-results.md"
START, END = "<!-- engines: scripts/engine_table.py -->", "<!-- end of engines -->"
SCHEMES = ("BF16", "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")
# Recipes, as tests/engines names them: routed experts in INT4, all else in this.
BESIDE = {"Experts W4A16, rest W8A16": "W4A16 + `W8A16`", "Experts W4A16, rest FP8_DYNAMIC": "W4A16 + `FP8_DYNAMIC`"}
ENGINES = {"vllm": "vLLM", "transformers": "transformers"}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each model and engine, a column for each scheme or recipe, and why something is refused."""
    tried = {column for models in results["cells"].values() for cells in models.values() for column in cells}
    columns = {**{scheme: f"`{scheme}`" for scheme in SCHEMES}, **{c: text for c, text in BESIDE.items() if c in tried}}
    lines = ["| | | " + " | ".join(columns.values()) + " |", "|---" * (2 + len(columns)) + "|"]
    reasons: dict[str, int] = {}

    def text(cell: dict[str, Any] | None, column: str) -> str:
        if cell is None:
            return "" if column in BESIDE else "not tried"  # a dense model has no experts
        if cell["status"] == "works":
            return f"{abs(cell['kl']):.4f}"  # a sum of rounding errors may lie below 0
        if cell["status"] == "needs a GPU":
            return "GPU"
        return f"refused ({reasons.setdefault(cell['why'].split('. ')[0].strip(), len(reasons) + 1)})"

    models = results["cells"]["vllm"]
    for model in models:
        for engine, name in ENGINES.items():
            cells = results["cells"][engine].get(model, {})
            lines.append(f"| {model} | {name} | " + " | ".join(text(cells.get(column), column) for column in columns) + " |")
    versions = "; ".join(f"{name} {results['versions'][engine]}" for engine, name in ENGINES.items())
    lines += ["", f"{versions}. Refused: " + "; ".join(f"({i}) {why}" for why, i in reasons.items()) + "."]
    return "\n".join([*lines, *newer(results)])


def newer(results: dict[str, Any]) -> list[str]:
    """What the newer transformers does otherwise than the one of the table."""
    if "newer transformers" not in results["cells"]:
        return []
    pairs = [
        (f"{model} {scheme}", results["cells"]["transformers"][model][scheme], cell)
        for model, row in results["cells"]["newer transformers"].items()
        for scheme, cell in row.items()
    ]
    other = [what for what, a, b in pairs if a["status"] != b["status"]]
    apart = max(abs(a["kl"] - b["kl"]) for _, a, b in pairs if a["status"] == b["status"] == "works")
    verdicts = f"other verdicts for {', '.join(other)}" if other else "the same verdicts"
    version = results["versions"]["newer transformers"]
    return ["", f"transformers {version}: {verdicts}, and no figure more than {apart:.4f} from these."]


def written(page: str, results: dict[str, Any]) -> str:
    """The page with its table made anew. Raises SystemExit when it has no place for one."""
    return between(page, START, END, [table(results)])


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8"), read("engines")), "utf-8")
