"""Write docs/engines.md from the rules: `python scripts/engines_doc.py`. A test holds that the file is what this writes."""

from __future__ import annotations

from pathlib import Path

from quantkit.engines.registry import VERSIONS
from quantkit.engines.rules import Engine, Rule

TARGET = Path(__file__).parent.parent / "docs" / "engines.md"
HEAD = """# What engines demand

`quantkit plan MODEL --engine vllm --tp 8` asks these rules before any work, `quantkit verify OUT --engine vllm --tp 8` on a
checkpoint's headers. This file is written by `scripts/engines_doc.py` from `quantkit/engines`.

Every answer is one of four, and the worst of all rules counts: **does not load**, the engine raises, at the first request at
the latest; **loads and is wrong**, it computes something else; **nobody looked**; **loads** (a rule that says so is a note).
Exit codes: 0 loads; 1 does not load, or loads and is wrong; 3 nobody looked. In JSON `verdict` has these words, for the
whole (in `plan` under `engine`) and for each of `weights`, `findings`, `model` and `problems`. `loads` is true for one
answer alone.

Sources: *run* was tried, *read* was found in the engine's code. A rule asks a *plan* (names, shapes, config) or a *file*. A
version beside a rule: it holds in that one only. An engine without a version is the newest here; one that is not here has
no rules. Hardware: `cpu` is x86 without AMX, `amx` with it, `zen` AMD with zentorch, `gpu` a recent one, `sm90` one by name.
"""


def section(versions: tuple[Engine, ...]) -> str:
    engine, said = versions[-1], ", ".join(one.version for one in versions)
    known = "\n".join(f"| `{model}` | {how} |" for model, how in engine.architectures.items())
    every = sorted({id(rule): rule for one in versions for rule in one.rules}.values(), key=lambda rule: rule.id)
    rules = "\n".join(row(rule) for rule in every)
    return (
        f"\n## {engine.name} {said}\n\n| `model_type` | class |\n|---|---|\n{known}\n\n"
        f"| rule | verdict | what it does | source | asks |\n|---|---|---|---|---|\n{rules}\n"
    )


def row(rule: Rule) -> str:
    asks = " and ".join(kind for kind, question in (("plan", rule.check), ("file", rule.on_file)) if question)
    says = rule.says + (f" Fix: {rule.fix}." if rule.fix else "")
    only = f" ({', '.join(rule.versions)})" if rule.versions else ""
    return f"| `{rule.id}`{only} | {rule.verdict.value} | {says} | {rule.source} | {asks} |".replace("\n", " ")


def text() -> str:
    return HEAD + "".join(section(versions) for versions in VERSIONS.values())


if __name__ == "__main__":
    TARGET.write_text(text(), "utf-8")
