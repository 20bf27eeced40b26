"""A model picker in the composer.

Copy this file beside main.py and run it in its place. MODELS names what can be chosen besides the
default model, for example MODELS=gpt-4o-mini,anthropic/claude-sonnet-4-6.
"""

import json

import main

names = dict.fromkeys([main.model.model, *main.MODELS])
# ChatKit sends the id with each message; main.py accepts these.
picker = [{"id": name, "label": name.split("/")[-1]} for name in names]
main.PAGE_OPTIONS = json.dumps({"composer": {"models": picker}})

if __name__ == "__main__":
    main.serve()
