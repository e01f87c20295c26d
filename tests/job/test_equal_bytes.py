"""What `quantize` writes is, byte for byte, what it wrote when tests/golden/sums.json was recorded: see
scripts/golden_sums.py. An intended change of bytes records them anew and says why."""

from __future__ import annotations

from functools import cache

import pytest

from scripts.golden_sums import RECORD, Case, Record, Sums, cases, differences, machine, recorded, run

CASES = cases()
FREE = [case for case in CASES if not case.calibrated]
CALIBRATED = [case for case in CASES if case.calibrated]


@cache
def result(number: int) -> tuple[Sums, Record]:
    """Of that case, which is run once."""
    return run(CASES[number])


@pytest.fixture(scope="module")
def here() -> str:
    return machine(result(CASES.index(FREE[0]))[1])


@pytest.mark.parametrize("case", FREE, ids=lambda case: case.name)
def test_rounding_writes_the_same_on_every_machine(case: Case) -> None:
    seen, record = result(CASES.index(case))
    assert record["calibration_tokens"] == 0
    assert not differences(seen, recorded()["every machine"].get(case.name)), f"if it is meant: {RECORD}"


@pytest.mark.parametrize("case", CALIBRATED, ids=lambda case: case.name)
def test_calibrated_runs_write_the_same_on_a_machine_that_is_known(case: Case, here: str) -> None:
    known = recorded().get(here)
    if known is None:
        pytest.skip(f"no sums for {here}: with a version that is trusted, {RECORD}")
    seen, record = result(CASES.index(case))
    assert record["calibration_tokens"] > 0
    assert not differences(seen, known.get(case.name)), f"if it is meant: {RECORD}"


def test_calibrated_runs_repeat_themselves() -> None:
    """On tokens of their own and on lent ones. It is all that can be held on a machine without sums."""
    case = next(case for case in CALIBRATED if case.silent)
    seen, record = result(CASES.index(case))
    idle = [outcome for outcome in record["linears"].values() if outcome["coverage"] == 0]
    assert idle and all(outcome["lent"] > 0 for outcome in idle)
    assert run(case)[0] == seen


def test_every_recorded_run_is_still_made() -> None:
    names = {case.name for case in FREE}
    for where, sums in recorded().items():
        assert sums.keys() == (names if where == "every machine" else {case.name for case in CALIBRATED}), where
