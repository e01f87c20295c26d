"""What people see of an allocation: its cost before, what was measured, what was chosen."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from quantkit.errors import counted
from quantkit.report.words import number, size

__all__ = ["allocation_table", "cost_table", "sensitivity_table"]


def cost_table(cost: dict[str, Any]) -> Group:
    """What measuring would take."""
    what = f"{counted(cost['variants'], 'variant')} ({counted(cost['groups'], 'group')} in {', '.join(cost['schemes'])})"
    reads = f"{counted(cost['readings'], 'reading')} of the weights ({size(cost['read_bytes'])})"
    return Group(
        f"To choose, sensitivities must be measured: {what}, {reads}, {cost['forward_tokens']:,} tokens through the whole "
        f"model, scratch disk {size(cost['tape_bytes'])}.",
        "quantkit sensitivity MODEL -o FILE, then --sensitivity FILE; `quantize` does so itself.",
    )


def sensitivity_table(measured: dict[str, Any]) -> Table:
    """By group its loss in each scheme, the largest first."""
    schemes = measured["schemes"]
    table = Table(title=f"KL of each group alone, nats a token, on {measured['tokens']:,} tokens of {measured['text']}")
    table.add_column("group")
    for scheme in schemes:
        table.add_column(scheme, justify="right")
    for row in sorted(measured["groups"], key=lambda row: -max(row["kl"].values(), default=0.0)):
        table.add_row(row["name"], *(number(row["kl"].get(scheme)) for scheme in schemes))
    anchors = (f"{anchor['name']}: {number(anchor['kl'])}" for anchor in measured["anchors"])
    table.caption = "\n".join([*anchors, f"exponent {measured['exponent']:.2f}"])
    return table


def allocation_table(allocation: dict[str, Any]) -> Group:
    """The curve, and what was chosen on it."""
    table = Table(title=f"allocation for {allocation['target']}", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("size", "bits/weight", "predicted KL", ""):
        table.add_column(name, justify="left" if not name else "right")
    points = [*allocation["curve"], {**allocation, "chosen": True}]
    for point in sorted(points, key=lambda point: (point["output_bytes"], "chosen" in point)):
        cells = [size(point["output_bytes"]), f"{point['bits_per_weight']:.3f}", number(point["predicted_kl"])]
        table.add_row(*cells, "<- chosen" if "chosen" in point else "")
    counts = Counter(allocation["schemes"].values())
    lines = [f"{counted(count, 'group')} in {scheme}" for scheme, count in counts.most_common()]
    engine = f"; loads in {allocation['engine']}" if allocation["engine"] else ""
    return Group(table, f"{', '.join(lines)}; predicted for {allocation['text']}{engine}")
