"""With this recipe, the model thinks before it answers, and the chat shows its thoughts.

With a key     make run APP=tests/examples/thoughts.py
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k thoughts
Change         Set the effort to "minimal", "low", "medium" or "high".

The model must be able to think. The default models of Gemini and Anthropic can. For OpenAI, set
MODEL=gpt-5, for example. OpenAI does not send the thoughts; servers with its API, like vLLM, do.
"""

from typing import Any

from agents import ModelSettings
from openai.types.responses import ResponseReasoningSummaryTextDoneEvent
from openai.types.shared import Reasoning

import main


class ThinkingModel(main.ProviderModel):
    async def stream_response(self, *args: Any, **kwargs: Any) -> Any:
        """Stream the reply, with one more event at the end of each thought.

        chatkit begins the next thought after it: without it, the thoughts before and after a tool
        are run together. OpenAI's own models send it; openai-agents' conversion of chat completions
        does not.
        """
        async for event in super().stream_response(*args, **kwargs):
            if event.type == "response.reasoning_summary_part.done":
                yield ResponseReasoningSummaryTextDoneEvent(
                    type="response.reasoning_summary_text.done",
                    text=event.part.text,
                    **event.model_dump(exclude={"type", "part"}),
                )
            yield event


main.server.agent.model = ThinkingModel(main.model.model, canned_reply=main.model.canned_reply)
main.server.agent.model_settings = ModelSettings(reasoning=Reasoning(effort="low"))

if __name__ == "__main__":
    main.serve()
