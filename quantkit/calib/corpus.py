"""Texts that have a name: the standard library, which any machine with Python has, and data sets of the hub.

The standard library is split once into calibration and held-out modules. The held-out modules are kept out of the training
of `examples/tiny-hunyuan` and out of calibration, so that the demo measures on text that neither has seen. A module that
an interpreter does not ship is left out. The data sets are those that optimum names.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from quantkit.errors import CalibrationError
from quantkit.extras import need

__all__ = ["CALIBRATION", "HELD_OUT", "NAMED", "held_out_files", "named_documents", "stdlib_files"]

CALIBRATION = (
    *(
        "asyncio",
        "collections",
        "concurrent",
        "ctypes",
        "dbm",
        "email",
        "encodings",
        "html",
        "http",
        "importlib",
        "json",
    ),
    *("logging", "multiprocessing", "sqlite3", "unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc"),
    *("_pydecimal.py", "datetime.py", "inspect.py", "pickle.py", "socket.py", "typing.py", "turtle.py", "turtledemo"),
)
HELD_OUT = (
    *("argparse", "ast", "bdb", "calendar", "configparser", "contextlib", "difflib", "doctest", "enum", "fractions"),
    *("ftplib", "gettext", "heapq", "imaplib", "ipaddress", "locale", "mailbox", "optparse", "pdb", "plistlib"),
    *("pprint", "random", "shutil", "smtplib", "statistics", "subprocess", "tarfile", "tempfile", "textwrap"),
    *("threading", "tokenize", "traceback"),
)
STDLIB = {"stdlib": CALIBRATION, "stdlib-held-out": tuple(f"{name}.py" for name in HELD_OUT)}


@dataclass(frozen=True)
class DataSet:
    """A file of a data set on the hub: .parquet whose rows are lines of one text, or .json.gz with a document a line."""

    repository: str
    file: str


HUB = {
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    "wikitext2-test": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "c4": DataSet("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
}
MAX_DOCUMENTS = 20_000  # of c4's first file: about ten million tokens
_PATIENCE = 5  # seconds to wait for the hub's first answer
NAMED = (*STDLIB, *HUB)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(names: tuple[str, ...]) -> list[Path]:
    """The Python files of these modules and packages (tests left out), sorted."""
    files: list[Path] = []
    for name in names:
        path = _root() / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []
    return [f for f in files if "test" not in f.parts and "tests" not in f.parts]


def held_out_files() -> set[Path]:
    return set(stdlib_files(STDLIB["stdlib-held-out"]))


def named_documents(name: str) -> list[str]:
    """The documents of a named text. Raises CalibrationError when it is on the hub and the hub does not give it.

    The standard library: one per module; a file that is not UTF-8 (some test data) is left out.
    """
    if name in HUB:
        return _hub_documents(name)
    documents = []
    for path in stdlib_files(STDLIB[name]):
        data = path.read_bytes()
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return documents


def _fetch(name: str, data: DataSet) -> str:
    """Where the file lies in the hub's cache; it is fetched when it is not there.

    The hub is asked once before that, in a few seconds: the download itself would try again for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(data.repository, data.file, repo_type="dataset")
    if isinstance(cached, str):
        return cached
    try:
        get_hf_file_metadata(hf_hub_url(data.repository, data.file, repo_type="dataset"), timeout=_PATIENCE)
        return hf_hub_download(data.repository, data.file, repo_type="dataset")
    except Exception as error:  # beside its own, the library lets those of its HTTP client through, another in each version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"text '{name}' is {data.file} of the data set {data.repository}, and the hub did not give it: {reason}",
            "give a file of your own, such as text.txt, or connect to the hub once: the file is then cached",
        ) from error


def _hub_documents(name: str) -> list[str]:
    data = HUB[name]
    plain = data.file.endswith(".parquet")
    if plain:
        need("parquet", f"text '{name}'")
    path = _fetch(name, data)
    if plain:
        from pyarrow import parquet

        return ["".join(parquet.read_table(path, columns=["text"]).column("text").to_pylist())]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in islice(lines, MAX_DOCUMENTS)]
