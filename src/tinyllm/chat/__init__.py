"""Conversations as a model was trained on them: templates.py renders its Jinja template inside sandbox.py's
limits, reasoning.py tells what it thinks from what it answers, tools/ reads its calls of tools."""
