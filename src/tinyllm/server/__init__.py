"""The server: HTTP in, the public Python API below, so that every client people have can ask one model.

A dialect (a folder or file in dialects/) translates its requests to `ask.Ask` and what comes of them back;
nothing else knows a dialect. models.py holds the models, turns.py says who is computed when, guard.py who may
ask, streams.py how answers go out, app.py puts it together, and listen.py runs it. Only cli/serve.py imports
this package, which needs the extra `serve`. Read next: ask.py.
"""
