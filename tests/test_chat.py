"""Chat templates: exact prompts, the sources they are found in, and templates that mean harm."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from helpers_hostile import peak_below

from tinyllm.chat import sandbox
from tinyllm.chat.templates import ChatTemplate, require, template_from_directory, template_from_gguf
from tinyllm.errors import ArgumentError, FormatError, TemplateError

HELLO = [{"role": "user", "content": "Hello"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(source: str, **kwargs: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(HELLO, **kwargs)


# --- exact prompts ------------------------------------------------------------------------------------------


def test_goldens(data_dir: Path) -> None:
    cases = json.loads((data_dir / "chat/llamacpp_chat_goldens.json").read_text(encoding="utf-8"))
    same = [case for case in cases if case["same_as_python_jinja2"]]
    assert len(same) >= 28
    for case in same:
        template = ChatTemplate(case["template"], bos_token=case["bos_token"], eos_token=case["eos_token"])
        prompt = template.render(case["messages"], add_generation_prompt=case["add_generation_prompt"])
        assert prompt == case["expected_output_jinja"] or prompt == case["expected_output"], case["name"]


def test_makers_templates_render_or_say_why(data_dir: Path) -> None:
    contexts = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted((data_dir / "chat/contexts").glob("*.json"))
    ]
    templates = sorted((data_dir / "chat/jinja").glob("*.jinja"))
    prompts, refusals = [], []
    for path in templates:
        for context in contexts:
            variables = dict(context)
            tokens = {key: variables.pop(key) for key in ("bos_token", "eos_token")}
            template = ChatTemplate(path.read_text(encoding="utf-8"), **tokens, name=path.name)
            try:
                prompts.append(template.render(variables.pop("messages"), **variables))
            except TemplateError as e:
                refusals.append((path.name, str(e)))
    assert all("favourite LLM framework" in prompt or "tautology" in prompt for prompt in prompts)
    assert len(prompts) >= 2 * len(templates)
    # All of them are valid Jinja and within the limits; what is left is a template's own refusal, or a use of
    # data that the context does not have.
    assert all(
        text.startswith((f"the {name} failed: ", f"the {name} does not take these messages: "))
        for name, text in refusals
    )


def test_whitespace_control_is_that_of_transformers() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_tojson_escapes_no_html_and_keeps_the_order_of_keys() -> None:
    assert (
        render("{{ x | tojson }}", x={"b": "<é&'>", "a": [1, None, True]})
        == '{"b": "<é&\'>", "a": [1, null, true]}'
    )
    assert render("{{ x | tojson(indent=2) }}", x={"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'
    assert (
        render("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2})
        == '{"a":2,"b":1}'
    )
    assert render("{{ x | tojson(ensure_ascii=true) }}", x="é") == '"\\u00e9"'


def test_extras_of_chat_templates() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}{{ bos_token }}{% endgeneration %}{{ eos_token }}") == "<s></s>"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("{{ 'think' if enable_thinking else 'do not' }}", enable_thinking=False) == "do not"
    count = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    )
    assert render(count) == "1"
    nested = "{% for x in [[1, [[2, []]]], [3, []]] recursive %}{{ x[0] }}{{ loop(x[1]) }}{% endfor %}"
    assert render(nested) == "123"


def test_loop_knows_its_length_and_neighbours() -> None:
    source = (
        "{% for x in x %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.nextitem }} {% endfor %}"
    )
    assert render(source, x=["a", "b"]) == "1/2Falseb 2/2True "
    assert render("{% for x in x | select %}{{ loop.length }}{% else %}none{% endfor %}", x=[0]) == "none"


def test_variables_that_a_caller_may_give() -> None:
    source = (
        "{% if a is defined %}{% set b = 1 %}{% endif %}{{ b }}{{ c }}{% for d in messages %}{{ loop.index }}"
        "{{ d.role }}{% endfor %}{% macro e(f) %}{{ f }}{% endmacro %}{{ e(1) }}{{ strftime_now('%Y') }}"
        "{% if g is not defined %}{% set g = true %}{% endif %}{{ bos_token }}{{ unk_token }}{{ tools }}"
    )
    assert ChatTemplate(source, variables={"unk_token": "<unk>"}).free_variables() == ["a", "c", "g"]
    with pytest.raises(TemplateError, match="not valid"):
        ChatTemplate("{% if %}").free_variables()


def test_variables_of_the_makers_templates(data_dir: Path) -> None:
    found = {
        path.stem: ChatTemplate(path.read_text(encoding="utf-8")).free_variables()
        for path in (data_dir / "chat/jinja").glob("*.jinja")
    }
    assert found["Qwen-Qwen3-0.6B"] == found["HuggingFaceTB-SmolLM3-3B"] == ["enable_thinking"]
    assert "reasoning_effort" in found["openai-gpt-oss-120b"]


def test_tools_choose_the_tool_template() -> None:
    template = ChatTemplate("plain", tool_source="{{ tools | length }} tools")
    assert template.render(HELLO) == "plain"
    assert template.render(HELLO, tools=[]) == "plain"
    assert template.render(HELLO, tools=[{"type": "function"}]) == "1 tools"


def test_one_template_serves_many_threads() -> None:
    template = ChatTemplate(CHATML)
    prompts: list[str] = [""] * 8

    def work(i: int) -> None:
        prompts[i] = template.render([{"role": "user", "content": str(i) * 1000}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prompts == [
        f"<|im_start|>user\n{str(i) * 1000}<|im_end|>\n<|im_start|>assistant\n" for i in range(8)
    ]


def test_a_long_conversation_is_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 60.0)  # it takes two, on a busy machine more
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 500} for i in range(2000)]
    source = (
        "{% set ns = namespace(text='', seen=[]) %}{% for m in messages %}{% set ns.seen = ns.seen + [m] %}"
        "{% if messages[loop.index0:] | length > 0 %}{% endif %}"
        "{{ m.role ~ ': ' ~ m.content.strip() | trim }}\n{% endfor %}"
    )
    prompt = ChatTemplate(source).render(messages)
    assert prompt.count("assistant: ") == 1000
    assert len(prompt) > 4_000_000


# --- where templates are found ------------------------------------------------------------------------------


def test_gguf_metadata() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}default",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 1,
    }
    template = template_from_gguf(metadata)
    assert template is not None
    assert template.render(HELLO) == "<s>default"
    assert template.render(HELLO, tools=[{}]) == "tools"
    assert template_from_gguf({}) is None
    for name in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use"):
        with pytest.raises(FormatError, match=rf"{name}. is a int, expected a text"):
            template_from_gguf({name: 3})
    for odd in (1.5, "1", [1], True):
        with pytest.raises(FormatError, match=r"seperator_token_id must be an integer, not"):
            template_from_gguf(metadata | {"tokenizer.ggml.seperator_token_id": odd})


def test_directory_order(tmp_path: Path) -> None:
    assert template_from_directory(tmp_path) is None
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "chat_template": "config {{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = template_from_directory(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "config <s>"

    config["chat_template"] = [
        {"name": "tool_use", "template": "with tools"},
        {"name": "default", "template": "the default"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = template_from_directory(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "the default"
    assert template.render(HELLO, tools=[{}]) == "with tools"

    (tmp_path / "chat_template.jinja").write_text("the file {{ bos_token }}")
    template = template_from_directory(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "the file <s>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        template_from_directory(tmp_path)


def test_no_template_says_what_to_pass() -> None:
    with pytest.raises(TemplateError, match=r"stories has no chat template.*chat_template="):
        require(None, "stories")


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('Only user roles') }}",
            r"does not take these messages: Only user roles \(line 1\)",
        ),
        ("a\n{% if %}", r"is not valid, line 2"),
        ("a\n\n{{ nothing.here }}", r"failed: 'nothing' is undefined \(line 3\)"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
        ("{{ 1 + 'a' }}", "failed"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "failed|not valid"),
    ],
)
def test_errors_say_what_and_where(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(source)


@pytest.mark.parametrize(
    "messages", ["Hello", {"role": "user"}, ["Hello"], [{"content": "Hello"}], [{"role": 3}]]
)
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    with pytest.raises(TypeError, match="role"):
        ChatTemplate(CHATML).render(messages)


def test_only_plain_data_reaches_a_template() -> None:
    with pytest.raises(TypeError, match=r"messages\[0\]\['content'\] is a PosixPath"):
        ChatTemplate(CHATML).render([{"role": "user", "content": Path()}])
    with pytest.raises(TypeError, match="helper"):
        ChatTemplate(CHATML).render(HELLO, helper=open)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="nested"):
        ChatTemplate(CHATML).render(HELLO, tools=[{"of": loop}])
    for wrong in (5, "abc", {"a": 1}, ["abc"], [5]):
        for name in ("tools", "documents"):
            with pytest.raises(TypeError, match=f"{name} must be a list of dicts or None"):
                ChatTemplate(CHATML).render(HELLO, **{name: wrong})  # type: ignore[arg-type]
    for source in (b"x", 5, None):
        with pytest.raises(TypeError, match="a chat template must be a str, not"):
            ChatTemplate(source)  # type: ignore[arg-type]


# --- templates that mean harm -------------------------------------------------------------------------------
#
# None of these does any harm without the sandbox, either: the bounds are lowered, and small templates meet
# them.

LOWERED = {
    "MAX_WORK": 100_000,
    "MAX_VALUE": 10_000,
    "MAX_SOURCE": 8_000,
    "MAX_NODES": 1_000,
    "MAX_HELD": 5_000,
}


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of what the sandbox allows, and of what it needs no more than an eighth."""
    for name, bound in LOWERED.items():
        assert getattr(sandbox, name) >= 8 * bound
        monkeypatch.setattr(sandbox, name, bound)


DOUBLE = "{% for i in range(14) %}"
AGAIN = "{% for i in range(500) %}"
LONG = "{% set s = 'a' * 4500 %}"
PART = LONG + "{% set b = s[:2000] ~ 'b' ~ s[:2000] %}{% for i in range(9) %}"
SET = LONG + "{% set b = 'b' * 4000 ~ 'a' %}{% for i in range(9) %}"
END = "{% endfor %}"
VIEWS = (
    "{% set ns = namespace(d={'a': 1}, e={'a': 1}) %}"
    + "{% for i in range(14) %}{% set ns.d = {'a': ns.d.items(), 'b': ns.d.items()} %}"
    + "{% set ns.e = {'a': ns.e.items(), 'b': ns.e.items()} %}{% endfor %}"
)
NUMBERS = "{% set n = [" + ", ".join(["9" * 1200] * 6) + "] %}{% set n = n * 400 %}"
MACRO = "{% macro " + "m" * 900 + "() %}{% endmacro %}"


def doubled(start: str, step: str) -> str:
    return "{% set ns = namespace(s=" + start + ") %}" + DOUBLE + "{% set ns.s = " + step + " %}" + END


WORK = "does more work than a chat template may"
SIZE = "a text or list that is too large"
WIDE = "1000 is the most|a width that is too large"
NUMBER = "makes a number that is too large"
DEEP = "deeper than 100"
HOSTILE: dict[str, dict[str, str]] = {
    # Nothing to reach: without the sandbox each of these prints nothing, or a word.
    "failed": {
        "class": "{{ ''.__class__.x }}",
        "class by item": "{{ ''['__class__'].x }}",
        "class by map": "{{ ([''] | map(attribute='__class__') | first).x }}",
        "hidden of a function": "{{ raise_exception.__doc__.x }}",
        "hidden of a method": "{{ namespace.__doc__.x }}",
        "an attribute of a number": "{{ (1).real.x }}",
        "hidden of a block": "{{ self.__doc__.x }}",
        "hidden of a macro": "{% macro m() %}{% endmacro %}{{ m._func.x }}",
        "of a generator": "{{ (messages | select).gi_running.x }}",
        "change a list": "{{ messages.append(1) }}",
        "change a dict": "{{ messages[0].update({}) }}",
        "a function that templates need not": "{{ lipsum.x }}",
        "a method that templates need not": "{{ 'a'.expandtabs(1) }}{{ 'a'.encode() }}",
        "of a number": "{{ (1).bit_length() }}",
        "filters of ours": "{{ [[1]] | map('(turns)') | list }}",
        "empty cycler": "{{ cycler() }}",
        "division by nothing": "{{ 1 is divisibleby(0) }}",
        "a namespace as JSON": "{{ namespace() | tojson }}",
    },
    "No filter named": {
        "class by filter": "{{ ('' | attr('__class__')).x }}",
        "a filter that templates need not": "{{ 'a' | center(3) }}",
    },
    "an attribute or element of a value": {
        "attribute in format": "{{ '{0.real}'.format(1) }}",
        "element in format": "{{ '{0[0]}'.format('ab') }}",
        "format of attributes": "{% set ns = namespace(s=1) %}{{ ('{0.s}').format(ns) }}",
    },
    "cannot load another": {
        "import": "{% import 'a' as a %}",
        "from": "{% from 'a' import b %}",
        "include": "{% include 'a' ignore missing %}",
        "extends": "{% extends 'a' %}",
    },
    "without {% autoescape %}": {"autoescape": "{% autoescape true %}{% endautoescape %}"},
    "stands outside a loop": {
        "jump": "{% break %}",
        "jump out of a macro": "{% for i in [1] %}{% macro m() %}{% break %}{% endmacro %}{% endfor %}",
    },
    "Python says: .*not properly in loop": {
        "jump out of else": "{% for i in [1] %}{% else %}{% continue %}{% endfor %}",
    },
    "half a surrogate pair": {"half a surrogate pair": "{{ '\\ud800' }}"},
    "which no chat template needs": {"a set": "{{ {'a': 1}.keys() - {}.keys() }}"},
    "something other than numbers": {"sum of lists": "{{ ([['a'] * 9] * 9) | sum(start=[]) | length }}"},
    "a name that has brackets": {"percent, a name": "{{ '%(a(b))s' % {'a(b)': 1} }}"},
    WORK: {
        "turns": "{% for i in range(4000) %}{% endfor %}",
        "nested ranges": "{% for i in range(99) %}" * 2 + END * 2,
        "nested text loops": "{% set s = 'a' * 90 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
        "filters in a loop": LONG + "{% for i in range(30) %}{% set t = s | upper %}" + END,
        "macro calls itself twice": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(11) }}",
        "literal text": "{% for i in range(99) %}" + "a" * 1999 + END,
        "literal text in a block": "{% set t %}{% for i in range(4) %}" + "a" * 1999 + END + "{% endset %}"
        "{% for i in range(20) %}{% set u %}{{ t }}{% endset %}" + END,
        "compared lists": "{% set x = [[1] * 60] * 60 %}{% set y = [[1] * 60] * 60 %}"
        + AGAIN + "{% if x == y %}{% endif %}" + END,
        "in a list": "{% set x = [0] * 4500 %}{% for i in range(99) %}{% if 1 in x %}{% endif %}" + END,
        "tests of a long text": LONG + AGAIN + "{% if s is lower %}{% endif %}" + END,
        "methods of a long text": LONG + AGAIN + "{% set x = s.isalpha() %}" + END,
        "searched from the end": PART + "{% set x = s.rfind(b) %}" + END,
        "split from the end": PART + "{% set x = s.rsplit(sep=b) %}" + END,
        "stripped of many": SET + "{% set x = s.strip(b) %}" + END,
        "trimmed of many": SET + "{% set x = s | trim(chars=b) %}" + END,
    },
    "it makes long lists": {
        "lists that are dropped": "{% set s = 'xy,' * 2200 %}"
        + "{% for i in range(60) %}{% if s.split(',') %}{% endif %}" + END,
    },
    SIZE: {
        "text times": "{{ 'a' * 3000000 }}",
        "times text": "{{ 3000000 * 'a' }}",
        "list times": "{{ ([0] * 400000) | length }}",
        "list times, step by step": "{% set n = 400 %}{% set x = ['a' * 10] * n * n %}",
        "doubled by ~": doubled("'ab'", "ns.s ~ ns.s"),
        "doubled by +": doubled("'ab'", "ns.s + ns.s"),
        "doubled by a list": doubled("[1]", "[ns.s, ns.s]"),
        "doubled by a dict": doubled("1", "{'a': ns.s, 'b': ns.s}"),
        "doubled by dict()": doubled("1", "dict(a=ns.s, b=ns.s)"),
        "doubled by a tuple": doubled("1", "(ns.s, ns.s)"),
        "doubled by a block": "{% set ns = namespace(s='ab') %}"
        + DOUBLE + "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}" + END,
        "doubled by join": doubled("'ab'", "[1, 2, 3] | join(ns.s)"),
        "doubled by replace": doubled("'ab'", "ns.s.replace('b', 'bb') ~ ns.s"),
        "doubled by a cycler": "{% set ns = namespace(c=cycler(1)) %}"
        + DOUBLE + "{% set ns.c = cycler(ns.c.items, ns.c.items) %}" + END,
        "doubled by arguments": "{% set ns = namespace(v=1) %}"
        + "{% macro m() %}{% set ns.v = varargs %}{% endmacro %}" + DOUBLE + "{{ m(ns.v, ns.v) }}" + END,
        "join": "{{ range(900) | join('a' * 4000) }}",
        "str.join": "{{ ('a' * 4000).join(['a'] * 900) }}",
        "replace": "{{ ('a' * 1800) | replace('a', 'a' * 1800) }}",
        "str.replace": "{{ ('a' * 1800).replace('', 'a' * 1800) }}",
        "indent lines": "{{ ('\n' * 3000) | indent('a' * 900, true, true) }}",
        "indented JSON": "{{ ([1] * 3000) | tojson(indent=900) }}",
        "joined lists": "{% set x = [['a' * 900] * 9] * 300 %}{{ x }}",
        "percent, the same again": LONG + "{{ '%(a)s' * 900 % {'a': s} }}",
        "percent, many": LONG + "{{ '%s' * 90 % ((s[:100],) * 90) }}",
        "format, the same again": LONG + "{{ ('{0}' * 900).format(s) }}",
        "format, by name": LONG + "{{ ('{a}' * 900).format(a=s) }}",
        "compared views": VIEWS + "{{ ns.d == ns.e }}",
        "printed views": VIEWS + "{{ ns.d }}",
        "large numbers as JSON": NUMBERS + "{{ n | tojson }}",
        "large numbers joined": NUMBERS + "{{ n | join }}",
        "~ of many": LONG + "{{ s" + " ~ s" * 900 + " }}",
        "a macro's name": MACRO + "{{ ([" + "m" * 900 + "] * 3000) | string }}",
        "a macro's name, formatted": MACRO + "{{ ('{0}' * 2400).format(" + "m" * 900 + ") }}",
        "widths": "{{ ('{0:>999}' * 1100).format('') }}",
        "widths of percent": "{{ '%(a)999s' * 1100 % {'a': ''} }}",
        "joined attributes": LONG + "{% set ns = namespace(s=s) %}{{ ([ns] * 900) | join(attribute='s') }}",
    },
    WIDE: {
        "indent": "{{ 'a' | indent(2000, true) }}",
        "tojson": "{{ [1] | tojson(indent=2000) }}",
        "tojson separators": "{{ [1, 2] | tojson(separators=('a' * 2000, '')) }}",
        "round": "{{ 1.5 | round(2000, 'floor') }}",
        "ljust": "{{ 'a'.ljust(2000) }}",
        "format": "{{ '{:>2000}'.format(1) }}",
        "format, nested": "{{ '{:>{}}'.format(1, 2000) }}",
        "percent": "{{ '%2000d' % 1 }}",
        "percent star": "{{ '%*d' % (2000, 1) }}",
        "strftime": "{{ strftime_now('%c' * 600) }}",
    },
    NUMBER: {
        "power": "{{ 1 ** 5000 }}",
        "power, step by step": "{% set ns = namespace(n=9) %}"
        + "{% for i in range(11) %}{% set ns.n = ns.n * ns.n %}" + END,
    },
    "not valid, line 1: a number is too large": {
        "infinite number": "{{ 1e999 }}",
        "long number": "{{ " + "1" * 1300 + " }}",
        "long number in hexadecimal": "{{ 0x" + "f" * 1100 + " }}",
    },
    DEEP: {
        "macro calls itself": "{% macro m(n) %}{{ m(n - 1) if n }}{% endmacro %}{{ m(120) }}",
        "block calls itself": "{% set ns = namespace(n=0) %}"
        + "{% block b %}{% set ns.n = ns.n + 1 %}{{ self.b() if ns.n < 120 }}{% endblock %}",
        "recursive loop": "{% set ns = namespace(n=0) %}{% for x in [[1]] recursive %}"
        + "{% set ns.n = ns.n + 1 %}{{ loop([x]) if ns.n < 120 }}" + END,
        "nested tuples as a key": "{% set ns = namespace(t=()) %}{% for i in range(120) %}"
        + "{% set ns.t = (ns.t,) %}{% endfor %}{{ {ns.t: 1} | length }}",
        "long sum": "{{ " + "1 + " * 120 + "1 }}",
        "long denial": "{{ " + "not " * 120 + "1 }}",
    },
    "8000 is the most": {"huge source": "{# " + "a" * 9000 + " #}"},
    "parts .*1000 is the most": {
        "many names": "".join(f"{{%if a%}}{{%set b{i}=1%}}{{%endif%}}" for i in range(220))
    },
}  # fmt: skip


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize(
    ("message", "source"),
    [(message, source) for message, cases in HOSTILE.items() for source in cases.values()],
    ids=[name for cases in HOSTILE.values() for name in cases],
)
def test_hostile_templates_are_stopped(message: str, source: str) -> None:
    start = time.process_time()
    stopped(source, message)
    assert time.process_time() - start < 1


def stopped(source: str, message: str) -> None:
    """A unit of work stands for 8 bytes of memory at most: of all that is allowed that is 80 MB."""
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    with pytest.raises(TemplateError, match=message):  # which compiles it
        template.render(HELLO)
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError, match=message) as caught:
            template.render(HELLO)
        assert tracemalloc.get_traced_memory()[1] < 8 * LOWERED["MAX_WORK"] + 50_000
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("the chat template ")
    assert len(str(caught.value)) < 500


# Texts of a character have an object of 80 bytes in memory, those of two one of 51; what a namespace holds
# has no length of its own.
KEPT = {
    "split": ("'xy,' * 2200", "s.split(',')"),
    "split at a name": ("'xy,' * 2200", "s.split(sep=',')"),
    "words": ("'xy ' * 2200", "s.split()"),
    "from the end": ("'xy ' * 2200", "s.rsplit(' ')"),
    "lines": ("'\U0001f600\n' * 2200", "s.splitlines()"),
    "unique": ("'xy,' * 2200", "s.split(',') | unique | list"),
    "characters": ("'\U0001f600' * 4900", "s | list"),
    "sorted": ("'\U0001f600' * 4900", "s | sort"),
    "selected": ("'\U0001f600' * 4900", "s | select | list"),
    "joined": ("'\U0001f600' * 4900", "s | join"),
    "numbers": ("0", "range(1000) | list"),
    "cyclers": ("range(1000) | list", "cycler(*s)"),
}


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", KEPT)
def test_lists_that_are_kept(name: str) -> None:
    source, value = KEPT[name]
    stopped(
        f"{{% set ns = namespace(a=0) %}}{{% set s = {source} %}}"
        f"{{% for i in range(30) %}}{{% set ns.a = namespace(before=ns.a, v={value}) %}}{{% endfor %}}",
        WORK,
    )


def test_bounds_of_time_and_of_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "MAX_SECONDS", 0.0)
        with pytest.raises(TemplateError, match="it takes longer than 0 seconds"):
            render("{% for i in range(300) %}{% endfor %}")
    monkeypatch.setattr("jinja2.sandbox.MAX_RANGE", 100)
    assert render("{{ range(100) | length }}") == "100"
    with pytest.raises(TemplateError, match="Range too big"):
        render("{{ range(101) }}")


def test_what_is_nested_too_deeply_for_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own refusals, while Jinja reads a template and while Python compiles what Jinja made of it."""
    with pytest.raises(TemplateError, match="not valid, line 1: it is nested too deeply"):
        render("{{ " + "(" * 100 + "1" + ")" * 100 + " }}")
    for error in (RecursionError, MemoryError):

        def fail(*args: object, error: type[Exception] = error) -> None:
            raise error

        monkeypatch.setattr(sandbox.Sandbox, "_compile", fail)
        with pytest.raises(TemplateError, match="nested too deeply, or has too many"):
            render("{{ 1 }}")


def test_a_namespace_prints_without_what_it_holds() -> None:
    assert render("{% set a = namespace(b=[1]) %}{{ a }}{{ [a] }}") == "<namespace>[<namespace>]"


def test_a_failure_names_the_line() -> None:
    """Whatever went wrong while rendering, and what is known of a template that cannot be compiled."""
    for source in ("1 / 0", "cycler()", "1e999", "range(10 ** 6)", "'%2000d' % 1", "x.y", "[] | first.x"):
        with pytest.raises(TemplateError, match=r"line 3"):
            render("a\n\n{{ " + source + " }}")
    for source in ("{% break %}", "{% include 'a' %}", "{{ 0x" + "f" * 1100 + " }}", "{{ ''.nothing.x }}"):
        with pytest.raises(TemplateError, match=r"line 3"):
            render("a\n\n" + source)
    for_, if_ = "{% for a in [1] %}", "{% if 1 %}"
    for source in (
        *(for_ * 25 + "{% endfor %}" * 25, if_ * 120 + "{% endif %}" * 120, "{{ " + "(" * 100 + " }}"),
        *("{{ " + "9" * 5000 + " }}", "{{ 1" + " + 1" * 200 + " }}", "{% macro m(a, a) %}{% endmacro %}"),
    ):
        with pytest.raises(TemplateError, match=r"is not valid, line 3: [^ ]+ [^ ]+"):
            render("a\n\n" + source)
    for source in ("\ud800", "{{ strftime_now('\ud800') }}", "{{ 'a\ud800' }}", "{{ 'a\\n\\ud800' }}"):
        with pytest.raises(TemplateError, match=r"not valid, line 3: U\+D800 is half a surrogate pair"):
            render("a\n\n" + source)


def test_the_slowest_to_compile() -> None:
    """Half as many names as fit, set in half as many branches as fit, inside as many loops as fit: half
    of what the longest takes."""
    branches = "".join(f"{{%if a%}}{{%set b{i}=1%}}{{%endif%}}" for i in range(800))
    start = time.process_time()
    with peak_below(60):  # it takes 20 MB
        assert render("{% for x in [1] %}" * 15 + branches + "{% endfor %}" * 15) == ""
    assert time.process_time() - start < sandbox.MAX_SECONDS / 2


def test_texts_are_unicode() -> None:
    with pytest.raises(ArgumentError, match=r"messages\[0\]\['content'\] is no valid text: .*ud800"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "\ud800"}])
    with pytest.raises(TemplateError, match="surrogates not allowed"):
        render("{{ '%c' % 55296 }}")


def test_what_may_be_formatted_searched_and_left() -> None:
    assert render("{{ 'since 2024: {:>4}{{1234}}'.format(1) }}{{ '%s in 12345' % 2 }}") == (
        "since 2024:    1{1234}2 in 12345"
    )
    assert render("{{ {'a': 1}.items() }}{{ {'a': 1}.keys() | list }}") == "dict_items([('a', 1)])['a']"
    assert render("{{ [{'a': 1}, {'a': 2}] | join(', ', attribute='a') }}") == "1, 2"
    assert render("{{ 1 ~ none ~ [2] }}") == "1None[2]"
    assert render("{{ '%s-%5d%%' % ('a', 3) }}{{ '{0}{x}'.format(1, x=2) }}") == "a-    3%12"
    assert render("{{ 'a.b.c'.rsplit('.', 1)[0] }}{{ '<a>'.strip('<>') }}{{ ' b ' | trim }}") == "a.bab"
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"


def test_hidden_attributes_are_undefined() -> None:
    assert render("{{ ''.__class__ is defined }}{{ messages.clear is defined }}") == "FalseFalse"
