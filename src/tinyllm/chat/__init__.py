"""Conversations as a model was trained on them: templates.py renders its Jinja template inside sandbox.py's
limits, forms.py brings messages into the forms that it takes, prompts.py makes ids of what comes out and
origins.py tells what of it users wrote, reasoning.py tells what a model thinks from what it answers, tools/
reads its calls of tools."""
