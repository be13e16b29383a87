"""Batch: several prompts in one call share every read of the weights, and give what each would give alone.

python examples/batch.py [MODEL]
"""

import sys
import time

import tinyllm

PROMPTS = ["Tom had a dog", "Lily was sad because", "One day, a bird", "In the garden there was"]

with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    start = time.perf_counter()
    together = llm(PROMPTS, max_tokens=40, seed=7)
    batch_s = time.perf_counter() - start

    start = time.perf_counter()
    alone = [llm(prompt, max_tokens=40, seed=7) for prompt in PROMPTS]
    loop_s = time.perf_counter() - start

    for prompt, completion in zip(PROMPTS, together, strict=True):
        print(f"{prompt}{completion}\n")
    print(f"as a batch {batch_s:.2f} s, one after the other {loop_s:.2f} s")
    print("the same tokens:", [c.tokens for c in together] == [c.tokens for c in alone])
