"""RAG: cut a text into chunks of C tokens, find the N nearest to a question, and answer from them, quoted.

python examples/rag.py [QUESTION] [-N 2] [-C 60] [--text FILE] [--embedder MODEL] [--model MODEL]

Without arguments everything is the bundled model, which knows neither French nor facts: it shows the way that
the data take. With an embedding model and a chat model (docs/embeddings.md names some) it answers.
"""

import argparse
import re
from pathlib import Path

import numpy as np

import tinyllm

parser = argparse.ArgumentParser()
parser.add_argument("question", nargs="?", default="Que mange le lama ?")
parser.add_argument("-N", type=int, default=2, help="chunks that the answer is made of")
parser.add_argument("-C", type=int, default=60, help="tokens of a chunk at most")
parser.add_argument("--text", type=Path, default=Path(__file__).with_name("lamas.txt"))
parser.add_argument("--embedder", default="stories", help="makes the vectors")
parser.add_argument("--reranker", help="reads the 4 N nearest again and keeps the N best")
parser.add_argument("--model", default="stories", help="writes the answer")
args = parser.parse_args()


def chunks_of(text: str, most: int, llm: tinyllm.LLM) -> list[str]:
    """Pieces of at most `most` tokens, or one longer word, cut between words, anew in each paragraph."""
    chunks = []
    for paragraph in text.split("\n\n"):
        chunk, n = "", 0
        for word in re.findall(r"\s*\S+", paragraph):
            n_word = len(llm.tokenizer.encode(word, bos=False))
            if chunk and n + n_word > most:
                chunks.append(chunk.strip())
                chunk, n = "", 0
            chunk, n = chunk + word, n + n_word
        chunks += [chunk.strip()] if chunk else []
    return chunks


with tinyllm.load(args.embedder) as embedder:
    chunks = chunks_of(args.text.read_text(encoding="utf-8"), args.C, embedder)
    named = embedder.embedding.prompts  # what its makers put before questions and before texts
    vectors = embedder.embed(chunks, normalize=True, prompt="document" if "document" in named else None)
    question = embedder.embed(args.question, normalize=True, prompt="query" if "query" in named else None)
nearness = vectors @ question  # cosines
nearest = np.argsort(-nearness)[: args.N * (4 if args.reranker else 1)].tolist()

if args.reranker:
    with tinyllm.load(args.reranker) as reranker:
        scores = reranker.rerank(args.question, [chunks[i] for i in nearest])
    nearest = [nearest[i] for i in np.argsort(-scores)[: args.N]]

for i in nearest:
    print(f"[{i + 1}] {nearness[i]:.3f} « {chunks[i]} »\n")

quoted = "\n".join(f"[{i + 1}] « {chunks[i]} »" for i in nearest)
task = "Réponds à la question d'après ces extraits, et cite leur numéro"
asked = f"Extraits :\n{quoted}\n\n{task} : {args.question}"
with tinyllm.load(args.model) as llm:
    if llm.chat_template:
        answer = llm.chat([{"role": "user", "content": asked}], max_tokens=200, temperature=0)
    else:
        answer = llm(asked + "\nRéponse :", max_tokens=30, temperature=0)
print(f"{args.question}\n{answer.text.strip()}")
