"""Data sets of the hub by name, through the `datasets` library (the extra of that name)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.extras import install, lacking

__all__ = ["is_name", "rows"]

MAX_ROWS = 20_000
_PATIENCE = 5  # seconds to wait for the hub's first answer
_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


def is_name(source: str) -> bool:
    """Whether that could be OWNER/NAME, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT."""
    return _NAME.fullmatch(source) is not None and not source.startswith((".", "-"))


def rows(source: str) -> Iterator[dict[str, Any]]:
    """The first rows of a split ("train" unless it is named). Raises CalibrationError, within seconds, when the library is
    missing or the hub does not answer."""
    name, *more = source.split(":")
    if lacking("datasets"):
        raise CalibrationError(
            f"text '{source}' is no file; a data set of the hub needs the library datasets, which is not installed",
            f"{install('datasets')}, or give a file",
        )
    config, split = more[0] if len(more) == 2 else None, more[-1] if more else "train"
    try:
        _ask(name)
        import datasets

        dataset = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from islice(dataset, MAX_ROWS)
    except Exception as error:  # both libraries let those of their HTTP client through, another in each version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"text '{source}' is no file, and the hub did not give split '{split}' of the data set {name}: {reason[:300]}",
            "check the name (OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT) and the network, or give a file",
        ) from error


def _ask(name: str) -> None:
    """Once, in a few seconds: the library itself would try again for minutes."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(name, timeout=_PATIENCE)
