"""Mutation operators on syntax trees: list the mutation sites of a module, and apply one mutation.

A mutant is an index: `sites` lists all sites in the order of the syntax tree, `mutated` applies one. Annotations,
docstrings, decorators and strings are not mutated, because they do not change results. `assert`, `strict=True` and
`stable=True` are not mutated, because they guard against states that no test can reach. `if TYPE_CHECKING` is not
mutated, because its names are for annotations. `return False` becomes `return True` but not `return None`, which is
false too.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Site:
    """A mutation site. line: from 1. what: description of the change."""

    line: int
    description: str


class _Walk(ast.NodeTransformer):
    """Collects the sites; applies the mutation number `number`."""

    def __init__(self, number: int | None) -> None:
        self.sites: list[Site] = []
        self._number = number

    def _at(self, node: ast.AST, description: str) -> bool:
        self.sites.append(Site(getattr(node, "lineno", 0), description))
        return len(self.sites) - 1 == self._number

    def visit(self, node: ast.AST) -> ast.AST:
        """Visit children first, so that the numbers do not depend on the applied mutation."""
        if isinstance(node, ast.Raise):
            return self._raise(node)
        if (
            isinstance(node, ast.expr_context | ast.Assert)
            or _is_tiny(node)
            or (isinstance(node, ast.keyword) and node.arg in ("strict", "stable"))
        ):
            return node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            if isinstance(value, list):
                value[:] = [self.visit(item) if isinstance(item, ast.AST) else item for item in value]
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        change = CHANGES.get(type(node))
        return change(self, node) if change else node

    def _raise(self, node: ast.Raise) -> ast.AST:
        """The raised expression is not mutated, because its message does not change results."""
        return ast.copy_location(ast.Pass(), node) if self._at(node, "the raise is dropped") else node


def _is_tiny(node: ast.AST) -> bool:
    """Whether a node is the configuration of a tiny model for tests, whose sizes are arbitrary.

    It is named so, or is a literal config.json, which starts with the model's type.
    """
    if isinstance(node, ast.FunctionDef):
        return "tiny" in node.name
    if isinstance(node, ast.keyword):
        return node.arg is not None and node.arg.startswith("tiny")
    if isinstance(node, ast.Assign):
        return "TINY" in ast.unparse(node.targets[0])
    if not isinstance(node, ast.Dict) or not node.keys or not isinstance(node.values[0], ast.Constant):
        return False
    first = node.keys[0]
    return isinstance(first, ast.Constant) and first.value == "model_type"


def _compare(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Compare)
    for i, operator in enumerate(node.ops):
        other = COMPARISONS[type(operator)]
        if walk._at(node, f"{type(operator).__name__} becomes {other.__name__}"):
            node.ops[i] = other()
    return node


def _arithmetic(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BinOp | ast.AugAssign)
    other = ARITHMETIC.get(type(node.op))
    if other and walk._at(node, f"{type(node.op).__name__} becomes {other.__name__}"):
        node.op = other()
    return node


def _boolean(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BoolOp)
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    if walk._at(node, f"{type(node.op).__name__} becomes {type(other).__name__}"):
        node.op = other
    return node


def _not(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.UnaryOp)
    if isinstance(node.op, ast.Not) and walk._at(node, "the not is dropped"):
        return node.operand
    if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant) and walk._at(node, "no minus"):
        return node.operand
    return node


def _condition(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.If | ast.IfExp | ast.While)
    if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return node
    if not isinstance(node.test, ast.Compare | ast.UnaryOp) and walk._at(node, "the condition is negated"):
        node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
    return node


def _constant(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Constant)
    value = node.value
    changed: object
    if isinstance(value, bool):
        changed = not value
    elif isinstance(value, int):
        changed = value + 1 if abs(value) < 3 else 2 * value  # doubled, because adding 1 to a limit is often no error
    elif isinstance(value, float):
        changed = value * 2 if value else 1.0
    else:
        return node
    if walk._at(node, f"{value} becomes {changed}"):
        return ast.copy_location(ast.Constant(changed), node)
    return node


def _return(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Return)
    empty = node.value is None or (isinstance(node.value, ast.Constant) and node.value.value in (None, "", (), False))
    if not empty and walk._at(node, "None is returned"):
        node.value = ast.copy_location(ast.Constant(None), node)
    return node


def _call(walk: _Walk, node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Expr)
    if isinstance(node.value, ast.Call) and walk._at(node, "the call is dropped"):
        return ast.copy_location(ast.Pass(), node)
    return node


CHANGES: dict[type[ast.AST], Callable[[_Walk, ast.AST], ast.AST]] = {
    ast.Compare: _compare,
    ast.BinOp: _arithmetic,
    ast.AugAssign: _arithmetic,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _not,
    ast.If: _condition,
    ast.IfExp: _condition,
    ast.While: _condition,
    ast.Constant: _constant,
    ast.Return: _return,
    ast.Expr: _call,
}


def sites(source: str) -> list[Site]:
    """All mutation sites of a module."""
    walk = _Walk(None)
    walk.visit(ast.parse(source))
    return walk.sites


def mutated(source: str, number: int) -> ast.Module:
    """The module's syntax tree with mutation `number`."""
    tree = ast.parse(source)
    _Walk(number).visit(tree)
    return ast.fix_missing_locations(tree)
