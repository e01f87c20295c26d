"""Write docs/report.schema.json from the models in quantkit/report/schema.py."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.report.schema import Report

TARGET = Path(__file__).resolve().parent.parent / "docs" / "report.schema.json"


def text() -> str:
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
