"""Names of variables say what is in them: a participle such as `found` tells only that somebody looked."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers.modules import PACKAGE

VAGUE = frozenset(["found", "seen", "kept", "wanted", "said", "held", "given", "known", "made", "taken", "asked", "shown"])
MOST = 3  # variables of these names in the whole package: lower it as they go


def vague(tree: ast.Module) -> Iterator[str]:
    """Each place that binds a variable or a parameter of such a name, as line and name. Fields of a class are none."""
    fields = {
        id(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE and id(node) not in fields:
            yield f"{node.lineno}: {node.id}"
        elif isinstance(node, ast.arg) and node.arg in VAGUE:
            yield f"{node.lineno}: {node.arg}"


def test_variables_and_parameters_are_counted_and_fields_are_not() -> None:
    source = """
class Result:
    found: int
    kept = 1

def look(seen, /, *taken, wanted=1):
    with open(seen) as said:
        for made, known in said:
            found: int = made
    return [held for held in (found, known)] + (lambda asked: asked)(wanted) + (given := 1)
"""
    names = sorted(place.split()[1] for place in vague(ast.parse(source)))
    assert names == ["asked", "found", "given", "held", "known", "made", "said", "seen", "taken", "wanted"]


def test_variables_are_named_after_what_is_in_them() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    places = [f"{path.relative_to(PACKAGE)}:{place}" for path in files for place in vague(ast.parse(path.read_text()))]
    assert len(places) <= MOST, "\n".join(places)
