"""Stream: print a text while it is made, then say how fast that was.

python examples/stream.py [MODEL] [PROMPT]
"""

import sys

import tinyllm

model = sys.argv[1] if len(sys.argv) > 1 else "stories"
prompt = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"

with tinyllm.load(model) as llm:
    stream = llm.stream(prompt, max_tokens=100, seed=1)
    print(prompt, end="")
    for piece in stream:  # a piece is a token's text, whole characters only; it also has .token and .logprob
        print(piece, end="", flush=True)
    timings = stream.completion.timings
    print(f"\n\n{timings.generated_tokens / timings.generate_s:.0f} tokens a second")
