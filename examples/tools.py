"""Tools: a model asks for a function to be called, the script calls it, and the model goes on.

python examples/tools.py [MODEL]

A model that was trained for it decides by itself when to call. The small model that comes with tinyllm was
not: this script gives it a template, and forces the call (tool_choice), whose arguments a grammar makes fit.
"""

import sys
from typing import Literal

import tinyllm

TEMPLATE = """\
{% if tools %}{{ tools | tojson }} are called as <tool_call>.\n{% endif %}
{%- for m in messages %}{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}
{% endfor %}"""


def paint(color: Literal["red", "blue", "green"], number: int) -> str:
    """Paints balls.

    Args:
        color: What color they get.
        number: How many.
    """
    return f"Now {number} balls are {color}."


with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    template = None if llm.chat_template else TEMPLATE
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "Lily has balls, and she likes blue. Paint them!"}
    ]
    answer = llm.chat(
        messages,
        tools=[paint],
        tool_choice="paint",
        strict=True,
        chat_template=template,
        max_tokens=200,
        temperature=0,
    )
    messages.append({"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls})
    for call in answer.tool_calls:
        result = paint(**call.arguments)
        print(f"{call.name}({call.arguments}) returned {result!r}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    print(llm.chat(messages, tools=[paint], chat_template=template, max_tokens=60, seed=3))
