"""One model in two stages, each in a process of its own with half of the layers, as for a model that no
machine holds: the text is the one of a single process.

Here both are on this machine; with address= they are spread over a cluster.
Needs: pip install 'ray[data,serve]'
"""

import tinyllm
import tinyllm.ray

if __name__ == "__main__":
    alone = tinyllm.load("stories", device="cpu")("Once upon a time", max_tokens=30, seed=1)
    with tinyllm.ray.load("stories", stages=2) as llm:
        print(llm.model)
        completion = llm("Once upon a time", max_tokens=30, seed=1)
        print(completion.text)
        print("the same as in one process:", completion.tokens == alone.tokens)
