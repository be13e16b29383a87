"""Fork a session: one beginning, computed once, and several ways to go on from the same point.

python examples/fork_session.py [MODEL]
"""

import sys

import tinyllm

with tinyllm.load(sys.argv[1] if len(sys.argv) > 1 else "stories") as llm, llm.session(seed=5) as story:
    story.append("Once upon a time, a girl named Lily found a box in the garden.")
    story.generate(max_tokens=20)
    print(story.text, "\n")
    for turn in (" Lily was happy because", " Lily was scared because"):
        with story.fork() as branch:  # shares the pages of the cache; only what is new is computed
            branch.append(turn)
            completion = branch.generate(max_tokens=30)
            print(f"...{turn}{completion}\n")
