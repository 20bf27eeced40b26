"""customised.py with what a long conversation needs, too. tests/test_conversations.py drives it.

A message that ends with "via PROVIDER/MODEL" is answered by that model.
"""

import os
from dataclasses import replace

from agents import Agent, ModelSettings, StopAtTools, ToolOutputText, function_tool
from chatkit.types import ImageAttachment
from chatkit.widgets import Card, Text
from openai.types.shared import Reasoning

if base := os.environ.get("BASE"):  # another server of the tests' provider
    os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_BASE_URL"].replace("/openai", f"/{base}/v1")

import customised
import main

PIXEL = "data:image/png;base64,iVBORw0KGgo="


@function_tool
async def last_card(ctx: customised.Context) -> str:
    """Show a card, which ends the turn."""
    await ctx.context.stream_widget(Card(children=[Text(value="a card")]))
    return "the card was shown"


@function_tool
async def two_texts() -> list:
    """Answer in two parts."""
    return [ToolOutputText(text="one text"), ToolOutputText(text="another")]


async def image(attachment) -> dict:
    return {"type": "input_image", "detail": "auto", "image_url": PIXEL}


async def run_config_for(thread, input, context):
    model = main.message_text(input).partition(" via ")[2] if input else ""
    return replace(main.server.run_config, model=model or None)


@main.app.post("/image")
async def keep_image() -> str:
    id = main.store.generate_item_id("attachment", None, {})
    kept = ImageAttachment(
        id=id, name="a.png", mime_type="image/png", preview_url="https://chat.example/a.png"
    )
    await main.store.save_attachment(kept, {})
    return id


THINKING = ModelSettings(reasoning=Reasoning(effort="low"))
agent = main.server.agent
agent.tools += [last_card, two_texts]
agent.tool_use_behavior = StopAtTools(stop_at_tool_names=["pick_colour", "ask_page", "last_card"])
if "THINKING" in os.environ:
    agent.model_settings = THINKING
for name, model in {
    "Claude": "anthropic/claude-sonnet-4-5",
    "Gemini": "gemini/gemini-flash-latest",
    "DeepSeek": "deepseek/deepseek-v4-pro",
    "Mistral": "mistral/mistral-large-latest",
}.items():
    settings = THINKING if name == "Claude" else ModelSettings()
    agent.handoffs.append(Agent(f"Other {name}", model=model, model_settings=settings))
main.server.converter.attachment_to_message_content = image
main.server.run_config_for = run_config_for

if __name__ == "__main__":
    main.serve()
