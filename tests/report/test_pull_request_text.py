"""report.md, letter by letter: every part that a report may have, and names that try to be Markdown."""

from __future__ import annotations

from quantkit.report.compare import against
from quantkit.report.gates import decide, parse_gate
from quantkit.report.html import html
from quantkit.report.markdown import markdown
from quantkit.report.schema import Report, Run
from tests.helpers.paths import ROOT
from tests.helpers.reports import divergence, experts, fig, made, task

EXPECTED = ROOT / "tests" / "golden" / "data" / "pull_request.md"
EVIL = "<b>`*_|x|_*`</b>\n# [a](http://b) \u202e{{ 7*7 }}"


def whole(notes: str = "a text of which calibration has read 7 %", **origin: str) -> Report:
    """A report with a failed, an undecided and an exact gate, tasks, changes, a note, fallbacks and ids of its text."""
    began = {"bos_id": 1, "bos_added": True, "bos_why": "add_bos_token is true", "first_ids": [1, 15, 9], "first_tokens": []}
    row = {"key": "model.layers.0.q_proj", "layer": 0, "role": "q", "scheme": "W4A16", "weight_error": 1e20}
    report = made(
        linears=[{**row, "fallback": "rounding: few tokens"}, {**row, "key": "model.x", "weight_error": 0.01}],
        tasks=[task(fig(0.98, 0.95, 1.01)), task(fig(1)).model_copy(update={"name": "f1_task", "metric": "f1"})],
        notes=[notes],
        moe=experts(fig(0.04, 0.02, 0.06), fig(0.9), not_finite=["layer 2, expert 1"]),
        origin={
            "text_tokens": {"documents": 9, "conversations": 0, "skipped_rows": {}, **began},
            "tokens": 123456,
            "command": "quantkit eval 'a_b*c' --baseline x | tee <y>",
        },
    )
    gates = ("kl.mean < 0.001", "kl.p99 < 0.0105", "size.bytes <= 500", "tasks.gsm8k.recovery > 0.9")
    old = made(size={"bytes": 400}, divergence=divergence(p99=fig(0.001, 0.0009, 0.0011)))
    report = decide(against(report, old, "old_run/eval"), [parse_gate(gate) for gate in gates])
    return report.model_copy(update={"provenance": report.provenance.model_copy(update=origin)})


def runs() -> list[Run]:
    evil = whole(EVIL, quantized=EVIL, text=EVIL, unit=EVIL, command=EVIL, text_digest="other")
    return [Run(name="a_run", report=whole()), Run(name=EVIL, report=evil), Run(name="plain", report=decide(made()))]


def test_the_text_is_this() -> None:
    several = runs()
    assert markdown(several) == EXPECTED.read_text("utf-8")
    assert markdown(several).endswith("\n".join(markdown([run]) for run in several))


def test_nothing_is_markup_but_what_the_template_wrote() -> None:
    found = markdown([runs()[1]])
    prose, _, code = found.partition("To reproduce:")
    assert "<" not in prose and "# [" not in prose and "`" not in prose.replace("\\`", "") and " 49 " not in prose
    assert code.startswith("\n\n    <b>") and "\u202e" not in found and "{{ 7*7 }}" in code
    assert all(line.startswith("    ") or not line for line in code.split("\n")[1:])


def test_a_task_of_which_the_baseline_gets_nothing_right_is_shown() -> None:
    """As of needles that a small model never finds: there is no recovery, and none that is the worst."""
    nothing = task(fig(1)).model_copy(update={"recovery": None, "baseline": 0.0, "quantized": 0.0})
    run = [Run(name="x", report=decide(made(tasks=[nothing])))]
    assert "| 0.00 % | 0.00 % | – |" in markdown(run)
    assert "worst task recovery" not in html(run) and "gsm8k" in html(run)
    both = [Run(name="x", report=decide(made(tasks=[nothing, task(fig(0.9, 0.8, 1))])))]
    assert "<b>90.00 %</b><small>worst task recovery, gsm8k</small>" in html(both)
