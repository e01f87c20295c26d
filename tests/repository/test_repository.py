"""What outsiders meet first: one version, one licence, pages whose links and commands are there, checks that are CI's."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantkit
from quantkit.cli import main
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
BESIDE = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md", "examples/tiny-hunyuan/README.md")
PAGES = [README, *(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def cff() -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def test_one_version() -> None:
    """`quantkit.__version__`; what must say it too says the same."""
    assert "version" not in PROJECT["project"] and "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "quantkit.__version__"}
    latest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert latest and latest[1] == cff()["version"] == quantkit.__version__


def test_one_licence() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"] and "END OF TERMS AND CONDITIONS" in text
    project = PROJECT["project"]
    assert project["license"] == cff()["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert not [name for name in project["classifiers"] if name.startswith("License")]  # the field above says it
    assert project["authors"] == [{"name": name["name"]} for name in cff()["authors"]]


def test_addresses_are_public_ones() -> None:
    """No path of somebody's machine passes for an address of the project."""
    assert all(address.startswith("https://") for address in PROJECT["project"].get("urls", {}).values())


def blocks(page: Path) -> Iterator[str]:
    """Lines of indented and fenced code."""
    inside = False
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside or line.startswith("    "):
            yield line.strip()


def test_readme_is_narrow() -> None:
    assert [line for line in README.read_text("utf-8").splitlines() if len(line) > 120] == []


def test_the_first_screen_has_the_two_commands_and_what_was_never_run() -> None:
    screen = "\n".join(README.read_text("utf-8").splitlines()[:40])
    assert "    make demo " in screen and "    make test " in screen and "**What was never run:**" in screen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_pages_show_are_there(page: Path) -> None:
    for line in blocks(page):
        line = line.removeprefix(".venv/bin/")
        if line.startswith("make "):
            assert shlex.split(line, comments=True)[1] in TARGETS, line
        elif line.startswith("quantkit "):
            name, *words = shlex.split(line, comments=True)[1:]
            known = main.commands[name]
            options = {option for parameter in known.params for option in parameter.opts + parameter.secondary_opts}
            shown = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert shown <= options | {"-h", "--help"}, line


def heads(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_lead_somewhere(page: Path) -> None:
    """In the repository. That they also do in the site is what `make docs` holds."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.exists() and where.is_relative_to(ROOT), (page.name, target)
        assert not anchor or anchor in heads(where), (page.name, target)


def test_the_site_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").split("nav:\n")[1]
    shown = set(re.findall(r"[\w-]+\.md", nav))
    tree = ast.parse((ROOT / "scripts" / "docs_site.py").read_text("utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ELSEWHERE"
    }
    elsewhere = values["ELSEWHERE"]
    assert {ROOT / name for name in elsewhere} | set((ROOT / "docs").glob("*.md")) == set(PAGES)
    assert shown == set(elsewhere.values()) | {page.name for page in (ROOT / "docs").glob("*.md")}


def test_hooks_are_the_checks_of_ci() -> None:
    """`make test`, which CI runs, begins with `make check`."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe and hooks == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert re.search(r"^test: check$", MAKEFILE, re.MULTILINE) and "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_container_runs_the_two_commands() -> None:
    ran = re.findall(r"^RUN make (\S+)", (ROOT / "Containerfile").read_text("utf-8"), re.MULTILINE)
    assert ran == ["demo", "test"]


def test_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for name in set(re.findall(r"`((?:quantkit|tests|scripts|bench)/[\w/.]+|test_\w+\.py)`", text)):
        if not re.search("[A-Z]", name):  # quantkit/model/NAME.py
            assert (ROOT / name).exists() or list((ROOT / "tests").rglob(name)), name


def test_no_page_promises_an_index() -> None:
    """The package is on none; with an extra the package is there already."""
    for page in PAGES:
        if page.name != "engines.md":  # written from the rules' own words
            assert not re.search(r"pip install '?quantkit(?!\[)\b", page.read_text("utf-8")), page.name


FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def test_what_security_promises_of_other_peoples_files() -> None:
    """Nothing is unpickled, no remote code is allowed, no text is evaluated."""
    for path in sorted((ROOT / "quantkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not FORBIDDEN & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load"), (path, called)
                allowed = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert allowed.get("trust_remote_code", "False") == "False", path
