"""A Jinja environment for templates that came with a downloaded file: nothing to reach, and bounds on what
they may do.

Imports jinja2 alone, and is imported by chat.py only when a template is first rendered (jinja2 takes a while
to import).

Nothing to reach: values are plain data (chat.py copies them), attributes are those of a short list of types,
filters and globals are the ones that chat templates use, and no template can load another.

Bounds: everything a template makes is charged to a `Budget`. Jinja lets an environment see calls, arithmetic,
filters and printed values; what it does not show (loops, list displays, `~`, slices, comparisons, literal
text) is made visible by rewriting the syntax tree before it is compiled. Three rules then bound time and
memory: the total work has a limit, so has each value's expanded size, shared parts counted as often as they
occur, so that printing or comparing a value can never explode, and where one operation can take the product
of two sizes, in work or in memory, that is charged before it begins.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateRuntimeError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 18  # characters of a template; the longest in common use has 17 thousand
MAX_SECONDS = 5.0  # of this thread's processor time
MAX_DEPTH = 100  # calls inside calls
MAX_PAD = 1000  # a width, an indent, a precision
MAX_BITS = 4096  # of an integer
STEP = 32  # the charge for one loop turn or one operation, beside the size of what it makes

Guarded = Callable[..., Any]


class LimitError(TemplateRuntimeError):
    """A template did more than its budget allows."""


class RefusedError(TemplateRuntimeError):
    """The template itself refused the messages, through `raise_exception`."""


class Budget:
    """What one rendering may still do: `work` units in total, and no value whose expanded size exceeds
    `max_value`."""

    def __init__(self, input_size: int) -> None:
        self.max_value = 1_000_000 + 8 * input_size
        self.work = 10_000_000 + 64 * input_size
        self.deadline = time.thread_time() + MAX_SECONDS
        self.depth = 0
        self._next_look = self.work  # at the clock
        self._sizes: dict[int, tuple[object, int]] = {}  # by id; holding the object keeps the id its own

    def charge(self, n: int) -> None:
        self.work -= n + STEP
        if self.work < 0:
            raise LimitError("it does more work than a chat template may (an endless loop?)")
        if self.work < self._next_look:
            self._next_look = self.work - 64 * STEP
            if time.thread_time() > self.deadline:
                raise LimitError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def read(self, *values: Any) -> None:
        """Charges for looking through values, which is quicker than making them."""
        self.charge(sum(len(v) for v in values if isinstance(v, (str, list, tuple, dict))) // 16)

    def made(self, value: Any) -> Any:
        """Charges a new value, checks its size, and gives it back."""
        self.charge(len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
        self.size(value)
        return value

    def size(self, value: Any) -> int:
        """Characters and elements of a value, a part that occurs twice counted twice."""
        if isinstance(value, str):
            total = 1 + len(value)
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitError("it makes a number that is too large")
            return 1
        elif isinstance(value, (list, tuple, dict)):
            known = self._sizes.get(id(value))
            if known is not None:
                return known[1]
            parts: Iterable[Any] = value
            if isinstance(value, dict):
                parts = (part for item in value.items() for part in item)
            total = 1 + sum(map(self.size, parts))
            self._sizes[id(value)] = (value, total)
        else:
            return 1
        self.fits(total)
        return total

    def fits(self, n: int) -> None:
        """Called before a value of `n` characters or elements is made by one operation."""
        if n > self.max_value:
            raise LimitError("it makes a text or list that is too large")


def _tree_size(value: Any) -> int:
    """`Budget.size` of the caller's own data, which is a tree and needs no limit."""
    if isinstance(value, dict):
        return 1 + sum(_tree_size(key) + _tree_size(item) for key, item in value.items())
    if isinstance(value, list):
        return 1 + sum(map(_tree_size, value))
    return 1 + len(value) if isinstance(value, str) else 1


_current: ContextVar[Budget] = ContextVar("budget")


def _compared(value: Any) -> Any:
    """Unlike other reading, comparing goes through the parts of parts."""
    budget = _current.get()
    budget.charge(budget.size(value) // 16)
    return value


def _made(value: Any) -> Any:
    return _current.get().made(value)


def _pad(n: Any) -> None:
    if isinstance(n, str):
        n = len(n)
    if isinstance(n, int) and n > MAX_PAD:
        raise LimitError(f"it pads by {n}, and {MAX_PAD} is the most")


def _check_format(text: str, sign: str, values: Any) -> None:
    """Format strings may not ask for huge widths, nor take the width from an argument; and as each `sign` may
    print the same value once more, they are charged for all that this can give."""
    if re.search(r"\d{4}|\*|\{[^{}]*\{", text):
        raise LimitError("it formats with a width that is too large")
    budget = _current.get()
    budget.fits(len(text) + text.count(sign) * budget.size(values))


def _check_search(text: str, part: Any) -> None:
    """Python looks from the end for a part, and for one of many characters, in the product of the lengths."""
    if isinstance(part, str):
        _current.get().charge(len(text) * len(part) // 1024)


def _str_method(name: str, text: str, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Checks a call of a str method that can make much out of little; the arguments to call it with."""
    budget = _current.get()
    budget.read(text, *args, *named.values())
    if name == "join" and args:
        parts = list(args[0])
        budget.fits(len(text) * len(parts) + budget.size(parts))
        return (parts, *args[1:])
    if name == "replace" and len(args) >= 2:
        budget.fits(len(text) + text.count(str(args[0])) * len(str(args[1])))
    elif name in ("center", "ljust", "rjust", "zfill") and args:
        _pad(args[0])
    elif name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"):
        for part in (*args, *named.values()):
            _check_search(text, part)
    return args


def _filter_join(inner: Guarded, context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    parts = list(value)
    budget = _current.get()
    budget.fits(len(str(d)) * len(parts) + budget.size(parts))
    return inner(context, parts, d, attribute)


def _filter_replace(inner: Guarded, context: Any, s: Any, old: Any, new: Any, count: Any = None) -> Any:
    text = str(s)
    _current.get().fits(len(text) + text.count(str(old)) * len(str(new)))
    return inner(context, text, old, new, count)


def _filter_indent(inner: Guarded, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
    _pad(width)
    text = str(s)
    by = len(width) if isinstance(width, str) else int(width)
    _current.get().fits(len(text) + (text.count("\n") + 1) * by)
    return inner(text, width, first, blank)


def _filter_round(inner: Guarded, value: Any, precision: int = 0, method: Any = "common") -> Any:
    _pad(abs(precision))
    return inner(value, precision, method)


def _filter_trim(inner: Guarded, value: Any, chars: Any = None) -> Any:
    _check_search(str(value), chars)
    return inner(value, chars)


def _filter_sum(inner: Guarded, context: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        raise LimitError("it sums something other than numbers")
    return inner(context, iterable, attribute, start)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: unlike Jinja's own filter it escapes nothing for HTML and sorts no
    keys."""
    for width in (indent, *(separators or ())):
        _pad(width)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)  # the quick way; at most six times the value's size
    n, chunks = 0, []
    for chunk in encoder.iterencode(value):
        n += len(chunk)
        _current.get().fits(n)
        chunks.append(chunk)
    return "".join(chunks)


_PLAIN_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby int items last length list lower map
    max min reject rejectattr reverse safe select selectattr sort string title truncate unique upper wordcount
"""
_CHECKED_FILTERS: dict[str, Guarded] = {
    "join": _filter_join,
    "replace": _filter_replace,
    "indent": _filter_indent,
    "round": _filter_round,
    "sum": _filter_sum,
    "trim": _filter_trim,
}


def _charged(function: Guarded) -> Guarded:
    """A filter that is charged for what it reads and makes. `wraps` keeps the mark that tells Jinja which
    first argument to pass."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _current.get().read(*args, *kwargs.values())
        return _made(function(*args, **kwargs))

    return guarded


def _checked(name: str) -> Guarded:
    inner, check = FILTERS[name], _CHECKED_FILTERS[name]

    @wraps(inner)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _current.get().read(*args, *kwargs.values())
        return _made(check(inner, *args, **kwargs))

    return guarded


def _counted(test: Guarded) -> Guarded:
    """A test that is charged for what it reads."""

    @wraps(test)
    def guarded(*args: Any) -> Any:
        _current.get().read(*args)
        return test(*args)

    return guarded


class _Turns:
    """An iterable whose every turn is charged; its length, where it has one, stays known to `loop`."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        budget = _current.get()
        for value in self._values:
            budget.charge(0)
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]  # a TypeError is what Jinja expects then


def _turns(values: Any) -> Any:
    return values if isinstance(values, Undefined) else _Turns(values)


class _Namespace(Namespace):
    """`namespace()` printed without its contents, which may contain itself."""

    def __repr__(self) -> str:
        return "<namespace>"


def _raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    _pad(form)
    return datetime.now().strftime(form)


_STR_METHOD_NAMES = """
    capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix
    replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    zfill
"""
_STR_METHODS = frozenset(_STR_METHOD_NAMES.split())
_REACHABLE = (
    *(str, list, tuple, dict),
    *(Namespace, LoopContext, Macro, Cycler, Joiner, Undefined, BlockReference, TemplateReference),
)

_MADE, _COMPARED, _TURNS = "(made)", "(compared)", "(turns)"  # names of filters that no template can write


class _Rewrite(NodeTransformer):
    """Puts charges where Jinja shows the environment nothing, and refuses what it would turn into wrong
    Python."""

    def __init__(self) -> None:
        self._loops = 0  # around a node

    def _made(self, node: Any) -> nodes.Expr:
        return self._filter(node, _MADE)

    def _filter(self, node: Any, name: str) -> nodes.Expr:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_value(self, node: Any) -> nodes.Expr:
        return self._made(self.generic_visit(node))

    visit_Concat = visit_List = visit_Dict = visit_value

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return self._made(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return self._made(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._filter(node.expr, _COMPARED)
        for operand in node.ops:
            operand.expr = self._filter(operand.expr, _COMPARED)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Const:
        value = node.value
        is_huge = isinstance(value, int) and value.bit_length() > MAX_BITS
        if is_huge or (isinstance(value, float) and math.isinf(value)):
            raise TemplateSyntaxError("a number is too large", node.lineno)
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._loops += 1
        self.generic_visit(node)
        self._loops -= 1
        node.iter = self._filter(node.iter, _TURNS)
        return node

    def visit_jump(self, node: nodes.Node) -> nodes.Node:
        if not self._loops:
            tag = type(node).__name__.lower()
            raise TemplateSyntaxError(f"{{% {tag} %}} stands outside a loop", node.lineno)
        return node

    def visit_function(self, node: Any) -> Any:
        loops, self._loops = self._loops, 0
        self.generic_visit(node)
        self._loops = loops
        return node

    visit_Break = visit_Continue = visit_jump
    visit_Macro = visit_CallBlock = visit_Block = visit_function

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [self._made(n) if isinstance(n, nodes.TemplateData) else n for n in node.nodes]
        return node

    def visit_load(self, node: nodes.Node) -> None:
        tag = type(node).__name__.lower().replace("fromimport", "from")
        raise TemplateSyntaxError(f"a chat template cannot load another ({{% {tag} %}})", node.lineno)

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> None:
        raise TemplateSyntaxError("a chat template is plain text, without {% autoescape %}", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_load


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for training; here it is only a
    scope."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """Charges what is printed. Taking the context also keeps Jinja from evaluating constants while it
    compiles."""
    text = value if isinstance(value, str) else str(value)
    _made(text)
    return text


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; `compile_template` and `render` are all that chat.py needs of it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[LoopControlExtension, _Generation],
        )
        self.filters = {name: _charged(FILTERS[name]) for name in _PLAIN_FILTERS.split()}
        self.filters |= {name: _checked(name) for name in _CHECKED_FILTERS}
        self.filters |= {"tojson": _charged(_tojson), _TURNS: _turns, _MADE: _made, _COMPARED: _compared}
        self.tests = {name: _counted(test) for name, test in TESTS.items()}  # type: ignore[arg-type]
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _tree(self, source: str, filename: str) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise LimitError(f"it has {len(source)} characters, and {MAX_SOURCE} is the most")
        try:
            return self.parse(source, filename=filename)
        except ValueError:  # Python's limit of a number's digits
            raise LimitError("it has a number that is too large") from None

    def compile_template(self, source: str, filename: str) -> Any:
        """The jinja2.Template of `source`, whose frames in a traceback bear `filename`."""
        tree = _Rewrite().visit(self._tree(source, filename))
        return self.template_class.from_code(self, self.compile(tree, filename=filename), self.globals)

    def free_variables(self, source: str, filename: str) -> set[str]:
        """The names that a template reads and sets nowhere itself, or asks of whether they are defined."""
        tree = self._tree(source, filename)
        names = list(tree.find_all(nodes.Name))
        own = {name.name for name in names if name.ctx != "load"}
        own |= {macro.name for macro in tree.find_all(nodes.Macro)} | self.globals.keys() | {"loop"}
        tests = (test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined"))
        asked = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
        return ({name.name for name in names} - own) | (asked - self.globals.keys())

    def render(self, template: Any, variables: dict[str, Any]) -> str:
        token = _current.set(Budget(sum(map(_tree_size, variables.values()))))
        try:
            return "".join(template.generate(variables))
        finally:
            _current.reset(token)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not isinstance(obj, _REACHABLE) or (isinstance(obj, str) and attr not in _STR_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, "{", [*args, kwargs])
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _current.get()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    budget.fits(budget.size(value) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_BITS:
                raise LimitError("it makes a number that is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, "%", right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _current.get()
        if isinstance(__obj, LoopContext):  # loop(children), the recursive form
            args = tuple(_turns(arg) for arg in args)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _str_method(__obj.__name__, owner, args, kwargs)
        budget.depth += 1
        try:
            if budget.depth > MAX_DEPTH:
                raise LimitError(f"its calls nest deeper than {MAX_DEPTH}")
            return budget.made(super().call(__context, __obj, *args, **kwargs))
        finally:
            budget.depth -= 1
