"""The table of formats of tool calls in docs/tools.md.

`python tests/tools_table.py` prints it as Markdown; tests/test_tools.py checks that the page has it."""

from __future__ import annotations

from tinyllm.chat.tools import FORMATS, GENERIC, Format, ToolCall


def code(text: str) -> str:
    """Text for a cell of a table, line ends made visible."""
    text = text.replace("|", "\\|").replace("\n", "⏎")
    return f"```` {text} ````" if "`" in text else f"`{text}`"


def row(format: Format) -> str:
    signs = " ".join(code(sign) for sign in format.signs)
    tokens = " ".join(code(token) for token in format.tokens)
    told = signs + (f" or the tokens {tokens}" if tokens else "") or "none of the others"
    example = format.shape.write([ToolCall(format.id_of(0, "f"), "f", {"x": 5})])
    ends = " ".join(code(token) for token in format.end_tokens)
    return f"| {format.name} | {told} | {code(example)} | {'1' if format.is_single else ''} | {ends} |"


def table() -> str:
    head = "| format | signs in the template | a call of f(x=5) | calls a turn | ends a turn too |"
    return "\n".join([head, "|---|---|---|---|---|", *map(row, (*FORMATS, GENERIC))])


if __name__ == "__main__":
    print(table())
