"""Many users: replicas of the server behind Ray Serve, with the clients of `tinyllm-serve`.

Requests that begin alike go to the replica that has their beginning in its cache. On a cluster give
replicas=(1, 8) for as many as there is work for. Needs: pip install 'ray[data,serve]'
"""

import json
import urllib.request

from ray import serve

import tinyllm.ray
from tinyllm.ray.cluster import connection

if __name__ == "__main__":
    with connection(None):
        serve.start(http_options={"host": "127.0.0.1", "port": 8123}, logging_config={"log_level": "ERROR"})
        serve.run(tinyllm.ray.application("stories", name="stories"), name="llm")
        asked = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 20, "seed": 1}
        request = urllib.request.Request(
            "http://127.0.0.1:8123/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            print(json.load(answer)["choices"][0]["text"])
        serve.shutdown()
