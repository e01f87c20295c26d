"""Text that any machine with Python has: the standard library, split once into calibration and held-out modules.

The held-out modules are kept out of the training of `examples/tiny-hunyuan` and out of calibration, so that the demo
measures on text that neither has seen. A module that an interpreter does not ship is left out.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

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
NAMED = {"stdlib": CALIBRATION, "stdlib-held-out": tuple(f"{name}.py" for name in HELD_OUT)}


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
    return set(stdlib_files(NAMED["stdlib-held-out"]))


def named_documents(name: str) -> list[str]:
    """The documents of a named corpus: one per module; a file that is not UTF-8 (some test data) is left out."""
    documents = []
    for path in stdlib_files(NAMED[name]):
        data = path.read_bytes()
        try:
            documents.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return documents
