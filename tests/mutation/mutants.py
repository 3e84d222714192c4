"""The mutants of a module: its source with one small change each.

mutmut's operators make the changes, in everything that runs: mutmut's own runner leaves out module-level code
and decorated functions, here the tables of options and the properties that a plan consists of. Two operators
more delete what a person may delete unseen: a row of a table, and a statement that is a call.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst
from mutmut.mutation.mutators import mutation_operators

Display = cst.Dict | cst.List | cst.Set | cst.Tuple
ROW = (cst.Call, cst.Tuple, cst.SimpleString, cst.DictElement)


@dataclass(frozen=True)
class Mutant:
    """One changed source.

    Attributes:
        module: the module's name.
        where: the function that changed, with its class, or "module".
        diff: the lines removed ("- ...") and added ("+ ..."), without indentation.
        source: the whole module, changed.
    """

    module: str
    where: str
    diff: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        return "\n".join([f"{self.module} {self.where}", *self.diff])


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of `source`, each once; those that mean the same to Python as the original are left out."""
    tree = cst.parse_module(source)
    visitor = _Visitor()
    tree.visit(visitor)
    original = ast.dump(ast.parse(source))
    found: dict[str, Mutant] = {}
    for where, old, new in visitor.changes:
        changed = tree.visit(_Replacement(old, new)).code
        try:
            meaning = ast.dump(ast.parse(changed))
        except SyntaxError:
            continue
        if meaning != original and meaning not in found:
            found[meaning] = Mutant(module, where, _diff(source, changed), changed)
    return list(found.values())


def _diff(source: str, changed: str) -> tuple[str, ...]:
    lines = list(difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm=""))
    return tuple(f"{line[0]} {line[1:].strip()}" for line in lines[2:] if not line.startswith("@@"))


class _Visitor(cst.CSTVisitor):
    """Collects (where, old node, new node)."""

    def __init__(self) -> None:
        self.scope: list[str] = []
        self.changes: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        # Neither runs: what they say is the type checker's and the reader's.
        if isinstance(node, (cst.Annotation, cst.Decorator)):
            return False
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.scope.append(node.name.value)
        where = ".".join(self.scope) or "module"
        if not _is_never_mutated(node):
            self.changes += [
                (where, node, new)
                for kind, operator in [*mutation_operators, *DELETIONS]
                if isinstance(node, kind)
                for new in operator(node)
            ]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self.scope.pop()


class _Replacement(cst.CSTTransformer):
    def __init__(self, old: cst.CSTNode, new: cst.CSTNode) -> None:
        self.old, self.new = old, new

    def on_visit(self, node: cst.CSTNode) -> bool:
        return node is not self.old

    def on_leave(self, original_node: cst.CSTNode, updated_node: Any) -> Any:
        return self.new if original_node is self.old else updated_node


def _is_never_mutated(node: cst.CSTNode) -> bool:
    """mutmut's rule: `len(None)` and the like only raise."""
    return (
        isinstance(node, cst.Call)
        and isinstance(node.func, cst.Name)
        and node.func.value in ("len", "isinstance")
    )


def _without_a_row(node: Display) -> Iterator[cst.CSTNode]:
    """A table without one of its rows: a dict, or a list, set or tuple of calls, tuples or strings."""
    elements = node.elements
    if len(elements) < 2 or not all(isinstance(_row(element), ROW) for element in elements):
        return
    for i in range(len(elements)):
        left = [*elements[:i], *elements[i + 1 :]]
        if len(left) == 1:
            left[0] = left[0].with_changes(comma=cst.Comma())
        yield node.with_changes(elements=left)


def _row(element: cst.CSTNode) -> cst.CSTNode:
    return element.value if isinstance(element, cst.Element) else element


def _without_the_call(node: cst.Expr) -> Iterable[cst.CSTNode]:
    """A statement that is nothing but a call: deleted."""
    return [cst.Pass()] if isinstance(node.value, cst.Call) else []


DELETIONS: list[tuple[Any, Any]] = [(Display, _without_a_row), (cst.Expr, _without_the_call)]
