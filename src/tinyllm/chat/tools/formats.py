"""The formats in which models call tools: one table, a row each, recognised from a template's own text.

A new format is a row of `FORMATS`; most need no code. The first row counts whose signs all stand in the
template, or whose tokens are all special tokens of the vocabulary; never a model's name. Imports enveloped,
filled, literals, notations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tinyllm.chat.tools.enveloped import Enveloped
from tinyllm.chat.tools.filled import Filled, Harmony
from tinyllm.chat.tools.literals import Braces, Python
from tinyllm.chat.tools.notations import Tagged
from tinyllm.chat.tools.shapes import Shape


@dataclass(frozen=True)
class Format:
    """name: for messages and the table of docs/tools.md. signs: texts that all stand in the template;
    tokens: special tokens that say it as well, for templates that do not. end_tokens: what ends a turn of
    calls beside the model's own ends. id: of a call that has none; {n} counts a conversation's calls from 0.
    is_single: a turn has one call at most.
    """

    name: str
    shape: Shape
    signs: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    id: str = "call_{n}"
    is_single: bool = False

    def id_of(self, n: int, name: str) -> str:
        return self.id.format(n=n, name=name)

    def is_sign(self, template: str, special_tokens: Collection[str]) -> bool:
        in_template = bool(self.signs) and all(sign in template for sign in self.signs)
        return in_template or (bool(self.tokens) and set(self.tokens) <= set(special_tokens))

    def visible_ids(self, special_tokens: Mapping[str, int]) -> frozenset[int]:
        """The special tokens (text -> id) that have to be shown in the text, for its calls to be seen."""
        literals = "\0".join(self.shape.literals)
        return frozenset(id for text, id in special_tokens.items() if text and text in literals)

    def end_ids(self, special_tokens: Mapping[str, int]) -> frozenset[int]:
        """The special tokens that end a turn."""
        return frozenset(special_tokens[text] for text in self.end_tokens if text in special_tokens)


_NINE_OF = "call{n:05}"  # Mistral's templates insist on nine letters and digits
_NINE = "[a-zA-Z0-9]{9}"
_DSML = Tagged('<｜DSML｜parameter name="{key}" string="{string}">{value}</｜DSML｜parameter>\n')
_DSML_CALL = '<｜DSML｜invoke name="{name}">\n{arguments}</｜DSML｜invoke>\n'
_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

GENERIC = Format(
    "JSON",
    Enveloped(starts=("{", "[", "```json", "```")),
)

FORMATS = (
    Format(
        "gpt-oss (harmony)",
        Harmony("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"),
        signs=("<|channel|>", "<|message|>", "functions."),
        end_tokens=("<|call|>",),
        is_single=True,
    ),
    Format(
        "Gemma 4",
        Filled("<|tool_call>call:{name}{arguments}<tool_call|>", Braces('<|"|>')),
        signs=("<|tool_call>",),
        end_tokens=("<|tool_response>",),
    ),
    Format(
        "FunctionGemma",
        Filled("<start_function_call>call:{name}{arguments}<end_function_call>", Braces("<escape>")),
        signs=("<start_function_call>",),
        end_tokens=("<start_function_response>",),
    ),
    Format(
        "DeepSeek V3.2",
        Filled(_DSML_CALL, _DSML, "<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
        signs=("｜DSML｜", "function_calls>"),
    ),
    Format(
        "DeepSeek V4",
        Filled(_DSML_CALL, _DSML, "<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
        signs=("｜DSML｜", "tool_calls>"),
    ),
    Format(
        "DeepSeek V3 and R1",
        Filled(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
            between="\n",
            open=_CALLS_BEGIN,
            close=_CALLS_END,
        ),
        signs=(_CALLS_BEGIN, "```json"),
    ),
    Format(
        "DeepSeek V3.1",
        Filled(
            "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
            open=_CALLS_BEGIN,
            close=_CALLS_END,
        ),
        signs=(_CALLS_BEGIN,),
    ),
    Format(
        "Kimi K2",
        Filled(
            "<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
            open="<|tool_calls_section_begin|>",
            close="<|tool_calls_section_end|>",
            id="functions.{name}:{number}",
        ),
        signs=("<|tool_calls_section_begin|>",),
        id="functions.{name}:{n}",
    ),
    Format(
        "Solar Open",
        Filled(
            "<|tool_call:begin|>{id}<|tool_call:name|>{name}<|tool_call:args|>{arguments}<|tool_call:end|>",
            open="<|tool_calls|>",
        ),
        signs=("<|tool_call:begin|>",),
        end_tokens=("<|calls|>",),
    ),
    Format(
        "Mistral v11",
        Filled("[TOOL_CALLS]{name}[CALL_ID]{id}[ARGS]{arguments}", ids=_NINE),
        signs=("[TOOL_CALLS]", "[CALL_ID]"),
        id=_NINE_OF,
    ),
    Format(
        "Mistral v13",
        Filled("[TOOL_CALLS]{name}[ARGS]{arguments}"),
        signs=("[TOOL_CALLS]", "[ARGS]"),
        id=_NINE_OF,
    ),
    Format(
        "Mistral v3 and v7",
        Enveloped("[TOOL_CALLS]", listed=True, keys=("name", "arguments", "id"), ids=_NINE),
        signs=("[TOOL_CALLS]",),
        id=_NINE_OF,
    ),
    Format(
        "Command R7B and A",
        Enveloped(
            "<|START_ACTION|>",
            "<|END_ACTION|>",
            listed=True,
            keys=("tool_call_id", "tool_name", "parameters"),
        ),
        signs=("<|START_ACTION|>",),
        id="{n}",
    ),
    Format(
        "Command R",
        Enveloped("Action:\n```json\n", "\n```", listed=True, keys=("tool_name", "parameters")),
        signs=("Action:", "```json", "tool_name"),
    ),
    Format(
        "Apertus",
        Enveloped("<|tools_prefix|>", "<|tools_suffix|>", listed=True, keyed=True),
        signs=("<|tools_prefix|>",),
    ),
    Format("Nemotron Nano v2", Enveloped("<TOOLCALL>", "</TOOLCALL>", listed=True), signs=("<TOOLCALL>",)),
    Format("Apriel", Enveloped("<tool_calls>", "</tool_calls>", listed=True), signs=("<tool_calls>[",)),
    Format(
        "MiniMax M2",
        Filled(
            '<invoke name="{name}">\n{arguments}</invoke>\n',
            Tagged('<parameter name="{key}">{value}</parameter>\n'),
            "<minimax:tool_call>\n",
            "</minimax:tool_call>",
        ),
        signs=("<minimax:tool_call>",),
    ),
    Format(
        "Seed OSS",
        Filled(
            "<seed:tool_call>\n<function={name}>\n{arguments}</function>\n</seed:tool_call>",
            Tagged("<parameter={key}>{value}</parameter>\n"),
        ),
        signs=("<seed:tool_call>",),
    ),
    Format(
        "GLM 4.7 and 5",
        Filled(
            "<tool_call>{name}{arguments}</tool_call>",
            Tagged("<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"),
        ),
        signs=("</arg_key><arg_value>",),
    ),
    Format(
        "GLM 4.5 and 4.6",
        Filled(
            "<tool_call>{name}\n{arguments}</tool_call>",
            Tagged("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"),
        ),
        signs=("<arg_key>",),
    ),
    Format(
        "Qwen3-Coder, Qwen 3.5",
        Filled(
            "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>",
            Tagged("<parameter={key}>\n{value}\n</parameter>\n"),
        ),
        signs=("<function=", "<parameter="),
    ),
    Format(
        "Functionary 3.1",
        Filled("<function={name}>{arguments}</function>"),
        signs=("<function=",),
        end_tokens=("<|eom_id|>",),
    ),
    Format("GigaChat 3.1", Enveloped("<|function_call|>"), signs=("<|function_call|>",), is_single=True),
    Format(
        "GigaChat 3",
        Enveloped("<|message_sep|>\n\nfunction call<|role_sep|>\n", also=("function call<|role_sep|>",)),
        signs=("function call", "<|role_sep|>"),
        is_single=True,
    ),
    Format(
        "Hermes, Qwen 2.5 and 3, Granite 4",
        Enveloped("<tool_call>\n", "\n</tool_call>"),
        signs=("<tool_call>",),
    ),
    Format(
        "Phi-4-mini",
        Enveloped("<|tool_call|>", "<|/tool_call|>", listed=True, also=("functools",)),
        signs=("<|tool|>", "<|/tool|>"),
        tokens=("<|tool_call|>", "<|/tool_call|>"),
    ),
    Format("Granite 3", Enveloped("<|tool_call|>", listed=True), signs=("<|tool_call|>",)),
    Format("FireFunction", Enveloped("functools", listed=True), signs=("functools[",)),
    Format(
        "LFM2",
        Filled("{name}({arguments})", Python(), "<|tool_call_start|>[", "]<|tool_call_end|>", ", "),
        signs=("<|tool_list_start|>",),
        tokens=("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    Format(
        "Llama 3",
        Enveloped(keys=("name", "parameters"), also=("<|python_tag|>",), starts=("{",)),
        signs=("<|start_header_id|>ipython", "parameters"),
        end_tokens=("<|eom_id|>",),
        is_single=True,
    ),
)


def format_of(template: str, special_tokens: Collection[str] = ()) -> Format:
    """The format of a model with this chat template (all of its text) and these special tokens; GENERIC where
    it has none that is known."""
    return next((row for row in FORMATS if row.is_sign(template, special_tokens)), GENERIC)
