"""Chat templates: exact prompts, the sources they are found in, and templates that mean harm."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_hostile import peak_below

from tinyllm.chat.sandbox import MAX_SECONDS
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
    monkeypatch.setattr("tinyllm.chat.sandbox.MAX_SECONDS", 60.0)  # it takes two, on a busy machine more
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
        ("tokenizer_config.json", b"[" * 100_000),
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
        ("{% for a in range(3) %}" * 30 + "{% endfor %}" * 30, "failed|not valid"),
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

DOUBLE = "{% for i in range(99) %}"
LONG = "{% set s = 'a' * 450000 %}"
VIEWS = (
    "{% set ns = namespace(d={'a': 1}, e={'a': 1}) %}"
    + "{% for i in range(60) %}{% set ns.d = {'a': ns.d.items(), 'b': ns.d.items()} %}"
    + "{% set ns.e = {'a': ns.e.items(), 'b': ns.e.items()} %}{% endfor %}"
)
NUMBERS = "{% set n = [" + "9" * 1200 + "] * 400000 %}"
MACRO = "{% macro " + "m" * 30_000 + "() %}{% endmacro %}"
# Texts of a character have an object of 80 bytes in memory, those of two one of 51; what a namespace holds
# has no length of its own.
KEEP = (
    "{%% set ns = namespace(a=0) %%}{%% set s = %s %%}"
    "{%% for i in range(3000) %%}{%% set ns.a = namespace(before=ns.a, v=%s) %%}{%% endfor %%}"
)
KEPT = {
    "split": ("'xy,' * 220000", "s.split(',')"),
    "split at a name": ("'xy,' * 220000", "s.split(sep=',')"),
    "words": ("'xy ' * 220000", "s.split()"),
    "from the end": ("'xy ' * 220000", "s.rsplit(' ')"),
    "lines": ("'\U0001f600\n' * 220000", "s.splitlines()"),
    "unique": ("'xy,' * 220000", "s.split(',') | unique | list"),
    "characters": ("'\U0001f600' * 490000", "s | list"),
    "sorted": ("'\U0001f600' * 490000", "s | sort"),
    "selected": ("'\U0001f600' * 490000", "s | select | list"),
    "joined": ("'\U0001f600' * 490000", "s | join"),
    "numbers": ("0", "range(100000) | list"),
    "cyclers": ("range(100000) | list", "cycler(*s)"),
}

HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'].x }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ ([''] | map(attribute='__class__') | first).x }}",
    "class in format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "globals of a function": "{{ raise_exception.__globals__.x }}",
    "globals of a method": "{{ namespace.__init__.__globals__.x }}",
    "globals without underscores": "{{ strftime_now.func_globals.x }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._environment.x }}",
    "generator frame": "{{ (messages | select).gi_frame.f_globals.x }}",
    "change a list": "{{ messages.append(1) }}",
    "change a dict": "{{ messages[0].update({}) }}",
    "import": "{% import 'os' as os %}",
    "from": "{% from 'os' import path %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'base' %}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "nested ranges": DOUBLE * 6 + "{% endfor %}" * 6,
    "nested text loops": "{% set s = 'a' * 9000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "filters in a loop": "{% set s = 'a' * 900000 %}{% for i in range(999) %}{{ s | upper }}{% endfor %}",
    "macro calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro calls itself twice": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "block calls itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "text times": "{{ 'a' * 10 ** 10 }}",
    "times text": "{{ 10 ** 10 * 'a' }}",
    "list times": "{{ [0] * 10 ** 10 }}",
    "list times, step by step": "{% set x = ['a' * 1000] * 1000 * 1000 %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power, step by step": "{% set ns = namespace(n=9) %}"
    + DOUBLE
    + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(s='ab') %}" + DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubled by +": "{% set ns = namespace(s='ab') %}" + DOUBLE + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubled by a list": "{% set ns = namespace(s=[1]) %}"
    + DOUBLE
    + "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "doubled by a dict": "{% set ns = namespace(s=1) %}"
    + DOUBLE
    + "{% set ns.s = {'a': ns.s, 'b': ns.s} %}{% endfor %}",
    "doubled by dict()": "{% set ns = namespace(s=1) %}"
    + DOUBLE
    + "{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}",
    "doubled by a tuple": "{% set ns = namespace(s=1) %}"
    + DOUBLE
    + "{% set ns.s = (ns.s, ns.s) %}{% endfor %}",
    "doubled by a block": "{% set ns = namespace(s='ab') %}"
    + DOUBLE
    + "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    "doubled by join": "{% set ns = namespace(s='ab') %}"
    + DOUBLE
    + "{% set ns.s = [1, 2, 3] | join(ns.s) %}{% endfor %}",
    "doubled by replace": "{% set ns = namespace(s='ab') %}"
    + DOUBLE
    + "{% set ns.s = ns.s.replace('b', 'bb') ~ ns.s %}{% endfor %}",
    "literal text in a block": "{% set t %}{% for i in range(99999) %}"
    + "a" * 9999
    + "{% endfor %}{% endset %}",
    "literal text": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "join": "{{ range(90000) | join('a' * 90000) }}",
    "str.join": "{{ ('a' * 90000).join(['a'] * 90000) }}",
    "replace": "{{ ('a' * 90000) | replace('a', 'a' * 90000) }}",
    "str.replace": "{{ ('a' * 90000).replace('', 'a' * 90000) }}",
    "indent": "{{ 'a' | indent(10 ** 9, true) }}",
    "indent lines": "{{ ('\n' * 90000) | indent('a' * 1000, true, true) }}",
    "tojson": "{{ [1] | tojson(indent=10 ** 9) }}",
    "tojson separators": "{{ [1, 2] | tojson(separators=('a' * 90000, '')) }}",
    "round": "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "sum of lists": "{{ ([['a'] * 900] * 900) | sum(start=[]) | length }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "format, nested": "{{ '{:>{}}'.format(1, 999999999) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "strftime": "{{ strftime_now('%c' * 90000) }}",
    "namespace in itself": "{% set a = namespace() %}{% set a.a = [a, a] %}{{ a.a }}{{ a.a | tojson }}",
    "joined lists": "{% set x = [['a' * 900000] * 9] * 9 %}{{ x }}",
    "huge source": "{# " + "a" * 300_000 + " #}",
    "nested brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "long sum": "{{ " + "1 + " * 20000 + "1 }}",
    "autoescape": "{% autoescape 'a' | upper %}{% endautoescape %}",
    "constant": "{{ ('a' * 999999) | replace('a', 'a' * 999999) }}",
    "percent, the same again": LONG + "{{ '%(a)s' * 9000 % {'a': s} }}",
    "percent, many": LONG + "{{ '%s' * 9000 % ((s[:1000],) * 9000) }}",
    "format, the same again": LONG + "{{ ('{0}' * 9000).format(s) }}",
    "format, by name": LONG + "{{ ('{a}' * 9000).format(a=s) }}",
    "compared lists": "{% set x = [[1] * 700] * 700 %}{% set y = [[1] * 700] * 700 %}"
    + "{% if x == y %}{% endif %}" * 3000,
    "in a list": "{% set x = [0] * 450000 %}" + "{% if 1 in x %}{% endif %}" * 3000,
    "tests of a long text": LONG + "{% if s is lower %}{% endif %}" * 3000,
    "methods of a long text": LONG + "{{ " + "s.isalpha() ~ " * 2000 + "1 }}",
    "searched from the end": LONG + "{{ s.rfind(s[:200000] ~ 'b' ~ s[:200000]) }}",
    "split from the end": LONG + "{{ s.rsplit(sep=s[:200000] ~ 'b' ~ s[:200000]) }}",
    "stripped of many": LONG + "{{ s.strip('b' * 400000 ~ 'a') }}",
    "trimmed of many": LONG + "{{ s | trim(chars='b' * 400000 ~ 'a') }}",
    "empty cycler": "{{ cycler() }}",
    "infinite number": "{{ 1e999 }}",
    "long number": "{{ " + "1" * 200_000 + " }}",
    "long number in hexadecimal": "{{ 0x" + "f" * 200_000 + " }}",
    "quotes": "{{ " + "'\\" * 130_000,
    "opened often": "{{" * 130_000,
    "not a template": "{%" * 130_000,
    "division by nothing": "{{ 1 is divisibleby(0) }}",
    "compared views": VIEWS + "{{ ns.d == ns.e }}",
    "printed views": VIEWS + "{{ ns.d }}",
    "large numbers as JSON": NUMBERS + "{{ n | tojson }}",
    "large numbers joined": NUMBERS + "{{ n | join }}",
    "~ of many": LONG + "{{ s" + " ~ s" * 8000 + " }}",
    "a macro's name": MACRO + "{{ ([" + "m" * 30_000 + "] * 20000) | string }}",
    "a macro's name, formatted": MACRO + "{{ ('{0}' * 9000).format(" + "m" * 30_000 + ") }}",
    "widths": "{{ ('{0:\U0001f600>999}' * 80000).format('') }}",
    "widths of percent": "{{ '\U0001f600%(a)999s' * 60000 % {'a': ''} }}",
    "format of attributes": LONG + "{% set ns = namespace(s=s) %}{{ ('{0.s}' * 9000).format(ns) }}",
    "joined attributes": LONG + "{% set ns = namespace(s=s) %}{{ ([ns] * 9000) | join(attribute='s') }}",
    "doubled by a cycler": "{% set ns = namespace(c=cycler(1)) %}"
    + DOUBLE
    + "{% set ns.c = cycler(ns.c.items, ns.c.items) %}{% endfor %}{{ ns.c.items }}",
    "doubled by arguments": "{% set ns = namespace(v=1) %}"
    + "{% macro m() %}{% set ns.v = varargs %}{% endmacro %}"
    + DOUBLE
    + "{{ m(ns.v, ns.v) }}{% endfor %}{{ ns.v }}",
    "nested tuples as a key": "{% set ns = namespace(t=()) %}{% for i in range(99999) %}"
    + "{% set ns.t = (ns.t,) %}{% endfor %}{{ {ns.t: 1} | length }}",
    "a set": "{{ {'a': 1}.keys() - {}.keys() }}",
    "filters of ours": "{{ [[1]] | map('(turns)') | list }}",
    "many names": "".join(f"{{%if a%}}{{%set b{i}=1%}}{{%endif%}}" for i in range(7500)),
    "half a surrogate pair": "{{ '\\ud800' }}",
    **{f"lists that are kept: {name}": KEEP % (source, value) for name, (source, value) in KEPT.items()},
    "lists that are dropped": "{% set s = 'xy,' * 220000 %}"
    + "{% for i in range(60) %}{% if s.split(',') %}{% endif %}{% endfor %}",
    "jump": "{% break %}",
    "jump out of a macro": "{% for i in [1] %}{% macro m() %}{% break %}{% endmacro %}{% endfor %}",
    "jump out of else": "{% for i in [1] %}{% else %}{% continue %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    # The sandbox stops at a fixed amount of work (about a second on a slow machine) and at five seconds
    # whatever happens; processor time, so that a busy machine cannot make this fail.
    start = time.process_time()
    with peak_below(120), pytest.raises(TemplateError) as caught:  # the worst takes 72 MB
        render(HOSTILE[name])
    assert time.process_time() - start < MAX_SECONDS + 1
    assert ("kept" in name) <= ("does more work" in str(caught.value))
    assert str(caught.value).startswith("the chat template ")
    assert len(str(caught.value)) < 500


def test_a_failure_names_the_line() -> None:
    """Whatever went wrong while rendering, and what is known of a template that cannot be compiled."""
    for source in ("1 / 0", "cycler()", "1e999", "range(10 ** 9)", "'%999999d' % 1", "x.y", "[] | first.x"):
        with pytest.raises(TemplateError, match=r"line 3"):
            render("a\n\n{{ " + source + " }}")
    for source in ("{% break %}", "{% include 'a' %}", "{{ 0x" + "f" * 9999 + " }}", "{{ ''.nothing.x }}"):
        with pytest.raises(TemplateError, match=r"line 3"):
            render("a\n\n" + source)
    for_, if_ = "{% for a in [1] %}", "{% if 1 %}"
    for source in (
        *(for_ * 25 + "{% endfor %}" * 25, if_ * 120 + "{% endif %}" * 120, "{{ " + "(" * 5000 + " }}"),
        *("{{ " + "9" * 5000 + " }}", "{{ 1" + " + 1" * 200 + " }}", "{% macro m(a, a) %}{% endmacro %}"),
    ):
        with pytest.raises(TemplateError, match=r"is not valid, line 3: [^ ]+ [^ ]+"):
            render("a\n\n" + source)
    for source in ("\ud800", "{{ strftime_now('\ud800') }}", "{{ 'a\ud800' }}", "{{ 'a\\n\\ud800' }}"):
        with pytest.raises(TemplateError, match=r"not valid, line 3: U\+D800 is half a surrogate pair"):
            render("a\n\n" + source)
    with pytest.raises(TemplateError, match="nested too deeply, or has too many"):
        render("{%if a%}" + "{%elif a%}" * 4000 + "{%endif%}")


def test_the_slowest_to_compile() -> None:
    """As many names as fit, set in as many branches as fit, inside as many loops as fit."""
    branches = "".join(f"{{%if a%}}{{%set b{i}=1%}}{{%endif%}}" for i in range(1600))
    start = time.process_time()
    with peak_below(120):  # it takes 40 MB
        assert render("{% for x in [1] %}" * 15 + branches + "{% endfor %}" * 15) == ""
    assert time.process_time() - start < MAX_SECONDS  # it takes one


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
