"""Write docs/engines.md from the rules: `python scripts/engines_doc.py`. A test holds that the file is what this writes."""

from __future__ import annotations

from pathlib import Path

from quantkit.engines.registry import ENGINES
from quantkit.engines.rules import Engine, Rule

TARGET = Path(__file__).parent.parent / "docs" / "engines.md"
HEAD = """# What engines demand

`quantkit plan MODEL --engine vllm --tp 8` asks these rules before any work, `quantkit verify OUT --engine vllm --tp 8` on a
checkpoint's headers. This file is written by `scripts/engines_doc.py` from `quantkit/engines`.

Verdicts: **refused**, the engine raises; **wrong**, it loads and computes something else; **unknown**, nobody has looked;
**note**, it works, and something is worth knowing. Refused and wrong give exit code 1. Sources: *run* was tried with that
version, *read* was found in its code. Kinds: a rule asks a *plan* (names, shapes, config), a *file*, or both.
"""


def section(engine: Engine) -> str:
    known = "\n".join(f"| `{model}` | {how} |" for model, how in engine.architectures.items())
    rules = "\n".join(row(rule) for rule in engine.rules)
    return (
        f"\n## {engine.name} {engine.version}\n\n| `model_type` | class |\n|---|---|\n{known}\n\n"
        f"| rule | verdict | what it does | source | asks |\n|---|---|---|---|---|\n{rules}\n"
    )


def row(rule: Rule) -> str:
    asks = " and ".join(kind for kind, question in (("plan", rule.check), ("file", rule.on_file)) if question)
    says = rule.says + (f" Fix: {rule.fix}." if rule.fix else "")
    return f"| `{rule.id}` | {rule.verdict.value} | {says} | {rule.source} | {asks} |".replace("\n", " ")


def text() -> str:
    return HEAD + "".join(section(engine) for engine in ENGINES.values())


if __name__ == "__main__":
    TARGET.write_text(text(), "utf-8")
