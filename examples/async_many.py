"""Many callers at once: tasks of asyncio share the model's calls, and one of them is stopped early.

python examples/async_many.py [MODEL]
"""

import asyncio
import sys
import time

import tinyllm

BEGINNINGS = ["The dog", "A girl named Lily", "Tom had", "In the garden", "One day", "The moon"]


async def main(llm: tinyllm.LLM) -> None:
    start = time.perf_counter()
    stories = await asyncio.gather(*(llm.acall(text, max_tokens=40, seed=1) for text in BEGINNINGS))
    seconds = time.perf_counter() - start
    for beginning, story in zip(BEGINNINGS, stories, strict=True):
        print(f"{beginning}{story.text.splitlines()[0]}")
    alone = [llm(text, max_tokens=40, seed=1).tokens for text in BEGINNINGS]
    print(
        f"{len(stories)} stories in {seconds:.1f} s; the same alone: {[s.tokens for s in stories] == alone}"
    )

    async with llm.astream("Once upon a time", max_tokens=400, seed=2) as story:
        async for piece in story:  # other tasks go on between two pieces
            print(piece, end="", flush=True)
            if len(story.completion.tokens) >= 20:
                break  # ends the computation, too
    print(" ... and so on")


with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm:
    asyncio.run(main(llm))
