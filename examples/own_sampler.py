"""Your own sampler: a processor is any callable that gets the logits as a numpy array and may change them.

python examples/own_sampler.py [MODEL]

Here: a text without the letter e, and a text whose every word the model found rather unlikely.
"""

import sys

import numpy as np

import tinyllm

with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    has_e = np.array(["e" in llm.tokenizer.token_text(i).lower() for i in range(llm.tokenizer.vocab_size)])

    def without_e(logits, tokens):
        """logits float32 [vocabulary], a copy to write to; tokens: the ids so far, the prompt's included."""
        logits[has_e] = -np.inf

    def surprising(logits, tokens):
        """Forbids the three likeliest tokens; a new array may be returned as well."""
        return np.where(logits >= np.sort(logits)[-3], -np.inf, logits)

    for processor in (without_e, surprising):
        completion = llm("Tom had a dog", max_tokens=40, temperature=0, processors=[processor])
        print(f"{processor.__name__}: Tom had a dog{completion}\n")
