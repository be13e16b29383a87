"""Chat: messages go through the model's own template and its answer comes back as a stream.

python examples/chat.py [MODEL]

An instruct model brings its template. The small model that comes with tinyllm is a base model and has none,
so this script gives it one, to show what a template does: it turns messages into the one text that a model
reads.
"""

import sys

import tinyllm

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '\n\n' if not loop.last }}{% endfor %}"

with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    template = None if llm.chat_template else TEMPLATE
    messages = []
    for words in ("Tell me a story about a dog named Max.", "Then Max saw a bird in the garden."):
        messages.append({"role": "user", "content": words})
        print(f"> {words}")
        stream = llm.chat(messages, stream=True, chat_template=template, max_tokens=60, seed=3)
        for piece in stream:
            print(piece, end="", flush=True)
        print("\n")
        messages.append({"role": "assistant", "content": stream.completion.text})
