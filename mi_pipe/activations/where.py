"""Conditions on rows, such as `token == ' Paris' and pos > 3`: a small language that is looked at, never executed.

A condition is written as for `pandas.DataFrame.query`. It is parsed to a Python syntax tree, and only what is listed
here has a meaning; anything else (calls, attributes, `@`, comprehensions) is refused, so that a condition from
anywhere can do nothing but choose rows:

- `and`, `or`, `not` (`&`, `|`, `~` are these words in other letters); `==`, `!=`, `<`, `<=`, `>`, `>=`, `in`, `not in`,
  also in chains such as `2 < pos <= 5`; `+`, `-`, `*`, `/`, `//`, `%` between numbers; numbers, strings, True, False,
  lists of these;
- columns by name, in backticks where the name is not a Python one: `massive:blocks.0.hook_resid_post`;
- `text.str.startswith('x')`, `.str.endswith('x')`, `.str.contains('x')` (plain text, no pattern), `pos.isin([1, 2])`.
"""

import ast
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool, Int, Shaped

from mi_pipe.core.errors import ConfigError, near_names

_PIECES = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`([^`]*)`|([&|~@])""")
_WORDS = {"&": " and ", "|": " or ", "~": " not "}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_STRING_TESTS: dict[str, Callable[[str, str], bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": operator.contains,
}
_MOST_SHOWN = 200
_EXAMPLE = " Conditions read like \"token == ' Paris' and pos > 3\"."


@dataclass(frozen=True)
class Texts:
    """A column of strings by reference: row i holds `values[codes[i]]`, code -1 is a missing string."""

    codes: Int[np.ndarray, " row"]
    values: list[str | None]

    def test(self, holds: Callable[[str | None], bool]) -> Bool[np.ndarray, " row"]:
        """Say for each row whether its string has a property, which is looked at once a distinct string."""
        return np.array([*map(holds, self.values), holds(None)], bool)[self.codes]

    def decoded(self) -> Shaped[np.ndarray, " row"]:
        """Return the strings themselves."""
        return np.array([*self.values, None], object)[self.codes]


Column = Shaped[np.ndarray, " row"] | Texts


class Condition:
    """A parsed condition; `columns` are the columns it names."""

    def __init__(self, text: str, known: Collection[str], aliases: Mapping[str, str] | None = None) -> None:
        """Parse `text` on the columns `known`; an alias stands for one of them.

        Raises ConfigError for what is not written as the module says, naming it.
        """
        self._text = text
        self._known = [*known, *(aliases or {})]
        self._named = {**{name: name for name in known}, **(aliases or {})}
        self._quoted: dict[str, str] = {}
        self._root = self._parsed()
        names = [node.id for node in ast.walk(self._root) if isinstance(node, ast.Name)]
        self.columns: list[str] = list(dict.fromkeys(self._column(name) for name in names))

    def mask(self, columns: Mapping[str, Column], n_rows: int) -> Bool[np.ndarray, " row"]:
        """Say for each of `n_rows` rows whether it fulfils the condition; raises ConfigError for mixed kinds."""
        try:
            with np.errstate(divide="raise", invalid="ignore"):
                found = self._value(self._root, columns)
        except (ArithmeticError, RecursionError) as error:
            raise self._error(f"it cannot be computed ({error})") from error
        if _kind(found) != "flag":
            self._refuse(f"it gives a {_kind(found)}, not yes or no")
        return np.array(np.broadcast_to(found, n_rows))

    def _parsed(self) -> ast.expr:
        source = _PIECES.sub(self._piece, self._text)
        try:
            return ast.parse(f"({source}\n)", mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or "it is nested too deeply"
            raise self._error(f"it is no expression ({reason})") from error

    def _piece(self, found: re.Match[str]) -> str:
        """Rewrite what pandas adds to Python: names in backticks, and signs for words."""
        string, name, sign = found.groups()
        if string is not None:
            return string
        if sign == "@":
            self._refuse("variables (@name) are not known here; write the value itself")
        if sign is not None:
            return _WORDS[sign]
        placeholder = f"_quoted_{len(self._quoted)}"
        self._quoted[placeholder] = name
        return placeholder

    def _column(self, name: str) -> str:
        name = self._quoted.get(name, name)
        if name not in self._named:
            near = near_names(name, self._known) or f" Columns are {', '.join(self._known)}."
            raise self._error(f"there is no column {name!r}", near)
        return self._named[name]

    def _value(self, node: ast.expr, columns: Mapping[str, Column]) -> Any:
        """Return what a node of the tree stands for: an array, Texts, or a constant."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as constant):
                return constant
            case ast.Name(id=name):
                return columns[self._column(name)]
            case ast.BoolOp(op=op, values=values):
                combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return reduce(combine, [self._of_kind("flag", value, columns) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return np.logical_not(self._of_kind("flag", operand, columns))
            case ast.UnaryOp(op=op, operand=operand):
                value = self._of_kind("number", operand, columns)
                return -value if isinstance(op, ast.USub) else value
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
                operands = [self._of_kind("number", side, columns) for side in (left, right)]
                return _ARITHMETIC[type(op)](*operands)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                sides = [left, *comparators]
                pairs = zip(sides[:-1], ops, sides[1:], strict=True)
                return reduce(np.logical_and, [self._compared(a, op, b, columns) for a, op, b in pairs])
            case ast.Call():
                return self._called(node, columns)
            case _:
                raise self._error(f"{self._shown(node)} has no meaning here")

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr, columns: Mapping[str, Column]) -> Any:
        value = self._value(left, columns)
        if isinstance(op, ast.In | ast.NotIn):
            found = self._among(value, right)
            return np.logical_not(found) if isinstance(op, ast.NotIn) else found
        if type(op) not in _COMPARE:
            self._refuse(f"{self._shown(left)} is compared with `is`; write ==")
        other = self._value(right, columns)
        kind, other_kind = _kind(value), _kind(other)
        if kind != other_kind:
            self._refuse(f"{self._shown(left)} is a {kind} and {self._shown(right)} a {other_kind}")
        if kind == "text" and not isinstance(op, ast.Eq | ast.NotEq):
            self._refuse(f"{self._shown(left)} is a text; texts are compared with ==, != and in")
        return _compare(_COMPARE[type(op)], value, other)

    def _among(self, value: Any, listed: ast.expr) -> Any:
        if not isinstance(listed, ast.List | ast.Tuple | ast.Set):
            self._refuse(f"{self._shown(listed)} is no list such as [' Paris', ' Rome']")
        if any(isinstance(part, ast.Name) for part in ast.walk(listed)):
            self._refuse(f"{self._shown(listed)} names a column; a list holds values")
        members = [self._value(item, {}) for item in listed.elts]
        for member, item in zip(members, listed.elts, strict=True):
            if _kind(member) != _kind(value):
                self._refuse(f"{self._shown(item)} is looked for among values that are a {_kind(value)}")
        if isinstance(value, Texts):
            wanted = set(members)
            return value.test(lambda text: text in wanted)
        return np.isin(value, members)

    def _called(self, node: ast.Call, columns: Mapping[str, Column]) -> Any:
        """Return the value of the few calls that have a meaning; the names are compared, nothing is looked up."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name() as column, attr="isin"), args=[listed], keywords=[]):
                return self._among(self._value(column, columns), listed)
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(value=ast.Name() as column, attr="str"), attr=name),
                args=[ast.Constant(value=str(part))],
                keywords=[],
            ) if name in _STRING_TESTS:
                texts, test = self._of_kind("text", column, columns), _STRING_TESTS[name]
                return texts.test(lambda text: text is not None and test(text, part))
            case _:
                raise self._error(
                    f"{self._shown(node)} cannot be called; "
                    "only .str.startswith, .str.endswith, .str.contains ('text') and .isin ([…]) of a column can"
                )

    def _of_kind(self, kind: str, node: ast.expr, columns: Mapping[str, Column]) -> Any:
        value = self._value(node, columns)
        if _kind(value) != kind:
            wanted = {"flag": "a condition", "number": "a number", "text": "a column of text"}[kind]
            self._refuse(f"{self._shown(node)} is a {_kind(value)}, where {wanted} is needed")
        return value

    def _shown(self, node: ast.AST) -> str:
        text = ast.unparse(node)
        for placeholder, name in self._quoted.items():
            text = text.replace(placeholder, f"`{name}`")
        return text

    def _refuse(self, reason: str) -> NoReturn:
        raise self._error(reason)

    def _error(self, reason: str, hint: str = _EXAMPLE) -> ConfigError:
        text = self._text if len(self._text) <= _MOST_SHOWN else f"{self._text[:_MOST_SHOWN]}…"
        return ConfigError(f"The condition {text!r} cannot be evaluated: {reason}.{hint}")


def _kind(value: Any) -> str:
    """Return text, flag or number."""
    if isinstance(value, Texts | str):
        return "text"
    if isinstance(value, bool) or (isinstance(value, np.ndarray | np.generic) and value.dtype == bool):
        return "flag"
    return "number"


def _compare(test: Callable[[Any, Any], Any], value: Any, other: Any) -> Any:
    if isinstance(value, str) and isinstance(other, Texts):
        value, other = other, value
    if isinstance(value, Texts) and isinstance(other, str):
        return value.test(lambda text: bool(test(text, other)))
    if isinstance(value, Texts) and isinstance(other, Texts):
        return np.asarray(test(value.decoded(), other.decoded()), bool)
    return np.asarray(test(value, other))
