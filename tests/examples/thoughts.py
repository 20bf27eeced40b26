"""The model thinks before it answers, and the chat shows its thoughts.

Try it         make run APP=tests/examples/thoughts.py
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k thoughts
Change         the effort: "minimal", "low", "medium" or "high"

The model must be able to think: Gemini's and Anthropic's default models are, OpenAI's needs for
example MODEL=gpt-5. OpenAI keeps the thoughts to itself; servers with OpenAI's API, like vLLM, tell
them.
"""

from agents import ModelSettings
from openai.types.shared import Reasoning

import main

main.server.agent.model_settings = ModelSettings(reasoning=Reasoning(effort="low"))

if __name__ == "__main__":
    main.serve()
