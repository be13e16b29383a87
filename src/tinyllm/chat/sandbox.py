"""A Jinja environment for templates that came with a downloaded file: nothing to reach, and bounds on what
they may do.

Imports jinja2 alone.

Nothing to reach: values are plain data (chat.py copies them), attributes are those of a short list of types,
filters and globals are the ones that chat templates use, and no template can load another.

Bounds: everything a template makes is charged to a `Budget`. Jinja lets an environment see calls, arithmetic,
filters and printed values; what it does not show (loops, list displays, `~`, slices, comparisons, literal
text) is made visible by rewriting the syntax tree before it is compiled. Four rules then bound time and
memory: the total work has a limit; so has the length that each value would have as text, shared parts counted
as often as they occur (`Budget.size`, which all checks use and which refuses values of a kind it does not
know), so that printing, comparing or encoding a value can never explode; where one operation can take the
product of two sizes, in work or in memory, or makes an object of each character, that is charged before it
begins; and a template has a bounded length and a bounded number of nodes, so that compiling it is bounded,
too. A unit of work stands for 8 bytes of memory at most: of the worst that is known everything together takes
80 MB, and 300 bytes more for each byte of the caller's own data.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property, partial, wraps
from string import Formatter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from jinja2 import TemplateRuntimeError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.lexer import Lexer
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 16  # characters of a template; the longest in common use has 17 thousand
MAX_NODES = 8192  # of its syntax tree; the largest in common use has 1250
MAX_SECONDS = 5.0  # of this thread's processor time
MAX_DEPTH = 100  # calls inside calls, values inside values
MAX_PAD = 1000  # a width, an indent, a precision
MAX_BITS = 4096  # of an integer
MAX_VALUE = 1_000_000  # characters of a value as text, beside those of the caller's data
MAX_WORK = 10_000_000  # units of work, beside those for the caller's data
STEP = 32  # the charge for one loop turn or one operation, beside the size of what it makes
ELEMENT = 16  # and for an element of a list: a text or a number takes up to 90 bytes, a character 4 at most
MAX_HELD = 500_000  # elements of values that were measured and may be gone

Guarded = Callable[..., Any]


class LimitError(TemplateRuntimeError):
    """A template did more than its budget allows."""


class RefusedError(TemplateRuntimeError):
    """The template itself refused the messages, through `raise_exception`."""


_VIEWS = (KeysView, ValuesView, ItemsView)
_PARTS = (list, tuple, dict, *_VIEWS)
# What prints as a word or two, however much hangs on it: an iterator, a function, a type...
_SHORT = (
    *(type(None), float, complex, range, Iterator, type, FunctionType, BuiltinFunctionType, MethodType),
    *(Namespace, LoopContext, Cycler, Joiner, Undefined, BlockReference, TemplateReference),
)


_Known = dict[int, tuple[object, int, int]]  # by id; holding the object keeps the id its own


def _weight(parts: Iterable[Any]) -> int:
    """The charge for a new list of `parts`. Lists and dicts inside were charged when they were made; texts
    and numbers may come with the list."""
    return sum(n if kind in (list, dict) else n * ELEMENT for kind, n in Counter(map(type, parts)).items())


class Budget:
    """What one rendering may still do: `work` units in total, and no value that is longer as text than
    `max_value`. Both grow with the size of the caller's own data, `variables`. share: of work and time."""

    def __init__(self, variables: dict[str, Any], share: float = 1.0) -> None:
        self._known: _Known = {}
        self._own: _Known = {}
        self._n_held = 0  # elements of what `_known` holds
        self.max_value: float = math.inf
        size = sum(map(self._measure_size, variables.values()))
        self._own, self._known = self._known, {}  # the caller's data lives as long as this does
        self.max_value = MAX_VALUE + 8 * size
        self.work = int(share * MAX_WORK) + 64 * size
        self.deadline = time.thread_time() + share * MAX_SECONDS
        self.depth = 0
        self._next_look = self.work  # at the clock

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
        self.charge(sum(len(v) for v in values if isinstance(v, (str, *_PARTS))) // 16)

    def made(self, value: Any) -> Any:
        """Charges a new value, checks its size, and gives it back."""
        if isinstance(value, (list, tuple)):
            self.charge(_weight(value))
        elif isinstance(value, dict):
            self.charge(_weight(value) + _weight(value.values()))
        else:
            self.charge(len(value) if isinstance(value, (str, *_PARTS)) else 0)
        self.size(value)
        return value

    def needs(self, n: int) -> None:
        """Called before `n` elements are made by one operation, which are charged when they are there."""
        if n * ELEMENT > self.work:
            raise LimitError("it does more work than a chat template may (it makes long lists)")

    def size(self, value: Any) -> int:
        """Characters of a value as text, a part that occurs twice counted twice; of texts inside a list,
        before they are escaped."""
        if self._n_held > MAX_HELD:  # measuring anew costs less than to keep whatever was ever made
            self._known.clear()
            self._n_held = 0
        return self._measure_size(value)

    def _measure_size(self, value: Any) -> int:
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        """(size, levels of values inside values)."""
        if isinstance(value, str):
            total, depth = 1 + len(value), 0
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitError("it makes a number that is too large")
            return 1 + value.bit_length() // 3, 0
        elif isinstance(value, _PARTS):
            known = self._own.get(id(value)) or self._known.get(id(value))
            if known is not None:
                return known[1:]
            parts: Iterable[Any] = value
            if isinstance(value, dict):
                parts = (part for item in value.items() for part in item)
            elif isinstance(value, ItemsView):  # its pairs would be new ones each time
                parts = (part for item in value for part in item)
            total, depth = 1, 0
            for n, inner in map(self._measure, parts):
                total += n
                depth = max(depth, 1 + inner)
            if depth > MAX_DEPTH:
                raise LimitError(f"its values nest deeper than {MAX_DEPTH}")
            self._known[id(value)] = value, total, depth
            self._n_held += len(value)
        elif isinstance(value, Macro):  # which its attributes are no longer than
            return self._measure((value.name, *value.arguments))
        elif isinstance(value, _SHORT):
            return 1, 0
        else:
            raise LimitError(f"it makes a {type(value).__name__}, which no chat template needs")
        self.fits(total)
        return total, depth

    def fits(self, n: int) -> None:
        """Called before a value of `n` characters or elements is made by one operation."""
        if n > self.max_value:
            raise LimitError("it makes a text or list that is too large")


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


def _check_format(text: str, values: Any) -> None:
    """What `text.format(...)` may print: for each field its width and precision, and all `values` once more.
    A width from an argument has no bound, and attributes lead to what `values` is not sized with."""
    total = len(text)
    for _, field, spec, _ in Formatter().parse(text):
        if field is not None:
            if re.search(r"[.\[]", field):
                raise LimitError("it formats an attribute or element of a value, rather than a value")
            total += _widths(re.findall(r"\d+|\{", spec or "")) + _current.get().size(values)
    _current.get().fits(total)


_PERCENT = re.compile(r"%(\([^()]*\)|\()?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?.?", re.DOTALL)


def _check_percent(text: str, values: Any) -> None:
    """The same of `text % values`."""
    total = len(text)
    for name, *widths in _PERCENT.findall(text):
        if name == "(":
            raise LimitError("it formats with a name that has brackets")
        total += _widths(filter(None, widths)) + _current.get().size(values)
    _current.get().fits(total)


def _widths(texts: Iterable[str]) -> int:
    widths = [int(n) if n.isdecimal() and len(n) < 9 else MAX_PAD + 1 for n in texts]
    if max(widths, default=0) > MAX_PAD:
        raise LimitError("it formats with a width that is too large")
    return sum(widths)


def _check_search(text: str, part: Any) -> None:
    """Python looks from the end for a part, and for one of many characters, in the product of the lengths."""
    if isinstance(part, str):
        _current.get().charge(len(text) * len(part) // 1024)


def _str_method(name: str, text: str, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Checks a call of a str method that can make much out of little; the arguments to call it with."""
    budget = _current.get()
    budget.read(text, *args, *named.values())
    if name in ("split", "rsplit", "splitlines"):
        by = [part for part in (*args, *named.values()) if isinstance(part, str) and part]
        budget.needs(text.count(by[0]) if by else len(text) // 2)
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


def _filter_join(inner: Guarded, context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    parts = list(value)
    budget = _current.get()
    budget.fits(budget.size(d) * len(parts) + budget.size(parts))
    return inner(context, parts, d)


def _concat(parts: tuple[Any, ...]) -> str:
    """`a ~ b ~ c`, of which Jinja shows nothing."""
    _made(parts)
    return str(_made("".join(map(str, parts))))


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
        return encoder.encode(value)  # the quick way; at most six times the value's size, which was checked
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


# What these make of a text is an object a character.
_ITERATING_NAMES = "groupby join list map max min reject rejectattr select selectattr sort sum unique"
_ITERATING = frozenset(_ITERATING_NAMES.split())


def _charged(function: Guarded, iterates: bool = False) -> Guarded:
    """A filter that is charged for what it reads and makes. `wraps` keeps the mark that tells Jinja which
    first argument to pass."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # where the value stands

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _current.get().read(*args, *kwargs.values())
        if iterates and isinstance(args[at], str):
            args = (*args[:at], _Turns(args[at]), *args[at + 1 :])
        return _made(function(*args, **kwargs))

    return guarded


def _checked(name: str) -> Guarded:
    return wraps(FILTERS[name])(partial(_CHECKED_FILTERS[name], FILTERS[name]))


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

# Names of filters for `_Rewrite` alone.
_MADE, _CONCAT, _COMPARED, _TURNS = "(made)", "(concat)", "(compared)", "(turns)"
_INTERNAL = {_MADE: _made, _CONCAT: _concat, _COMPARED: _compared, _TURNS: _turns}


def _check_text(text: str, line: int | None = None) -> None:
    """Raises TemplateSyntaxError for half a surrogate pair, which no prompt may hold. line: where a string
    stands; None: text is a template's source."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        what = f"U+{ord(text[e.start]):04X} is half a surrogate pair, which is no character"
        raise TemplateSyntaxError(what, line or 1 + text.count("\n", 0, e.start)) from None


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

    visit_List = visit_Dict = visit_value

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._filter(nodes.Tuple(node.nodes, "load", lineno=node.lineno), _CONCAT)

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
        if isinstance(value, str):
            _check_text(value, node.lineno)
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
    if not isinstance(value, str):
        _current.get().size(value)
        value = str(value)
    return str(_made(value))


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; `compile_template` and `render` are all that chat.py needs of it."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[LoopControlExtension, _Generation],
        )
        filters = {name: FILTERS[name] for name in _PLAIN_FILTERS.split()}
        filters |= {name: _checked(name) for name in _CHECKED_FILTERS}
        self.filters = {name: _charged(filter_, name in _ITERATING) for name, filter_ in filters.items()}
        self.filters |= {"tojson": _charged(_tojson)} | _INTERNAL
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

    @cached_property
    def lexer(self) -> Lexer:
        """Its own: Jinja keeps them in a cache with a lock, which a forked process or a signal handler could
        find held."""
        return Lexer(self)

    def _tree(self, source: str, filename: str) -> nodes.Template:
        """Raises TemplateSyntaxError, and LimitError for what lies at no line."""
        if len(source) > MAX_SOURCE:
            raise LimitError(f"it has {len(source)} characters, and {MAX_SOURCE} is the most")
        _check_text(source)
        parser = Parser(self, source, filename=filename)
        try:
            tree = parser.parse()
        except RecursionError:
            raise TemplateSyntaxError("it is nested too deeply", parser.stream.current.lineno) from None
        except ValueError:  # Python's limit of a number's digits
            raise TemplateSyntaxError("a number is too large", parser.stream.current.lineno) from None
        n, depth = 0, 0
        level: list[nodes.Node] = [tree]
        while level:
            n, depth = n + len(level), depth + 1
            if depth > MAX_DEPTH:
                raise TemplateSyntaxError(f"it is nested deeper than {MAX_DEPTH} levels", level[0].lineno)
            level = [child for node in level for child in node.iter_child_nodes()]
        if n > MAX_NODES:
            raise LimitError(f"it has {n} parts (names, texts, operations...), and {MAX_NODES} is the most")
        return tree

    def compile_template(self, source: str, filename: str) -> Any:
        """The jinja2.Template of `source`, whose frames in a traceback bear `filename`.

        Raises TemplateSyntaxError, and LimitError for what lies at no line.
        """
        tree = _Rewrite().visit(self._tree(source, filename))
        try:
            python = self.compile(tree, filename=filename, raw=True)
            code = self._compile(python, filename)
        except SyntaxError as e:
            raise TemplateSyntaxError(f"Python says: {e.msg}", _line_of(python, e.lineno or 1)) from None
        except (RecursionError, MemoryError):  # of the compiler's own stack; the length has a bound
            raise LimitError("it is nested too deeply, or has too many {% elif %}") from None
        return self.template_class.from_code(self, code, self.globals)

    def names(self, source: str, filename: str) -> set[str]:
        """The names that a template reads, its own among them."""
        names = self._tree(source, filename).find_all(nodes.Name)
        return {name.name for name in names if name.ctx == "load"}

    def free_variables(self, source: str, filename: str) -> set[str]:
        """The names that a template reads and sets nowhere itself, or asks of whether they are defined."""
        tree = self._tree(source, filename)
        names = list(tree.find_all(nodes.Name))
        own = {name.name for name in names if name.ctx != "load"}
        own |= {macro.name for macro in tree.find_all(nodes.Macro)} | self.globals.keys() | {"loop"}
        tests = (test for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined"))
        asked = {test.node.name for test in tests if isinstance(test.node, nodes.Name)}
        return ({name.name for name in names} - own) | (asked - self.globals.keys())

    def render(self, template: Any, variables: dict[str, Any], share: float = 1.0) -> str:
        """share: of what a template may do."""
        token = _current.set(Budget(variables, share))
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
            _check_format(value.__self__, (*args, kwargs))
            return wrapped(*args, **kwargs)

        return checked

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """By a name that a template gives, as `map` does."""
        if name in _INTERNAL:
            raise TemplateRuntimeError(f"No filter named {name!r}.")
        return super().call_filter(name, *args, **kwargs)

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
            _check_percent(left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _current.get()
        # A macro or a cycler makes lists of its arguments.
        budget.charge(ELEMENT * (len(args) + len(kwargs)))
        budget.fits(sum(map(budget.size, (*args, *kwargs.values()))))
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


def _line_of(python: str, line: int) -> int:
    """The template's line of a line of the Python that Jinja made of it, which ends with a table of them."""
    pairs = re.findall(r"(\d+)=(\d+)", python.rpartition("debug_info = ")[2])
    return max((int(ours) for ours, theirs in pairs if int(theirs) <= line), default=1)
