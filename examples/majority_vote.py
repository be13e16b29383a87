"""Majority vote: sample many answers to one question and count them.

python examples/majority_vote.py [MODEL]

One answer drawn at random can be off; the one that most samples agree on is steadier. All samples are one
batch: the prompt is computed once and every step reads the weights once for all of them.
"""

import sys
from collections import Counter

import tinyllm

PROMPT = "Tom was hungry. He went to the kitchen and ate a big red"

with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    samples = llm(PROMPT, n=32, max_tokens=4, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    votes = Counter(words[0].strip(".,!") for sample in samples if (words := sample.text.split()))
    print(PROMPT, "...")
    for answer, n in votes.most_common(5):
        print(f"{n:3} of {len(samples)}  {answer}")
