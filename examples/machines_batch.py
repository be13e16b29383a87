"""Many prompts on a Ray cluster: a data set of rows in, the same rows with their answers out.

Here the cluster is this machine alone; RAY_ADDRESS names another. A row's seed comes from its key, so that
neither the number of workers nor a retry changes an answer. Needs: pip install 'ray[data,serve]'
"""

import logging

import ray

import tinyllm.ray
from tinyllm.ray.cluster import connection

rows = [{"id": name, "prompt": f"{name} had a", "max_tokens": 12} for name in ("Tom", "Lily", "Ben")]
rows.append({"id": "wrong", "prompt": "Max", "max_tokens": -1})  # an error of its own, and of nobody else

if __name__ == "__main__":
    with connection(None):
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        answers = tinyllm.ray.generate(ray.data.from_items(rows), "stories", workers=1, seed=1)
        for row in sorted(answers.take_all(), key=lambda row: str(row["id"])):
            print(f"{row['id']}: {row['error'] or row['text']}")
