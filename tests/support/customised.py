"""The server as a user of the file would extend it: tools, agents, guardrails, actions, a store.

It is run in main.py's place. The scripts in the tests call the agent's tools. A message that ends
with "via PROVIDER/MODEL" is answered by that model.
"""

import asyncio
import gc
import json
import os
import time
from dataclasses import replace
from datetime import datetime
from functools import partial

from agents import (
    Agent,
    GuardrailFunctionOutput,
    RunContextWrapper,
    StopAtTools,
    ToolOutputImage,
    ToolOutputText,
    function_tool,
    output_guardrail,
)
from chatkit import types
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.errors import CustomStreamError
from chatkit.widgets import Card, Text
from fastapi import Request
from openai.types.shared import Reasoning

if base := os.environ.get("BASE"):  # another server of the tests' provider
    os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_BASE_URL"].replace("/openai", f"/{base}/v1")

import main
from sqlite_store import SQLiteStore
from thoughts import ThinkingModel

Context = RunContextWrapper[AgentContext]
for name in ("SILENCE_SECONDS", "STOP_SECONDS"):
    setattr(main, name, float(os.environ.get(name, getattr(main, name))))
if "DATABASE" in os.environ:
    main.store = main.server.store = SQLiteStore(os.environ["DATABASE"])
if retry := getattr(main.server.run_config.model_settings, "retry", None):
    retry.backoff = {"initial_delay": 0}  # it would wait 0.25 seconds
agent = main.server.agent
agent.tools = []  # a copy may have tools of these names


def tool(function, **options):
    agent.tools.append(function_tool(function, **options))
    return function


def place(thread) -> dict:
    id = main.store.generate_item_id("message", thread, {})
    return {"id": id, "thread_id": thread.id, "created_at": datetime.now()}


def hidden(thread, content) -> types.ThreadItemDoneEvent:
    item = types.HiddenContextItem(**place(thread), content=content)
    return types.ThreadItemDoneEvent(item=item)


@tool
async def clock() -> str:
    return "noon"


@tool
async def stock(city: str) -> str:
    return f"{city}: A=4711, B=4712"


IMAGE = "data:image/png;base64,iVBORw0KGgo="
OUTPUTS = {
    "report": "the start " + "x" * 200_000 + " the end",
    "two texts": [ToolOutputText(text="one text"), ToolOutputText(text="another")],
    "half a pair": "half \ud83d",  # of surrogates
    "a picture": [ToolOutputText(text="two things"), ToolOutputImage(image_url=IMAGE)],
}


@tool
async def give(what: str):
    return OUTPUTS[what]


@tool
async def slow(ctx: Context) -> None:
    print(f"slow starts in {ctx.context.thread.id}", flush=True)
    await asyncio.Event().wait()


@partial(tool, failure_error_function=None)
async def broken() -> None:
    """A tool whose own connection timed out, which the provider did not cause."""
    raise TimeoutError("the database was silent")


@tool
async def pick_colour(ctx: Context, hint: str, name: str = "pick_colour") -> str:
    ctx.context.client_tool_call = ClientToolCall(name=name, arguments={"hint": hint})
    return "asked"


@tool
async def play_sound(ctx: Context) -> None:
    await ctx.context.stream(types.ClientEffectEvent(name="sound", data={"of": "a bell"}))


@tool
async def give_notice(ctx: Context) -> None:
    await ctx.context.stream(types.NoticeEvent(level="info", message="Look up.", title=None))


@tool
async def leave_note(ctx: Context) -> None:
    await ctx.context.stream(hidden(ctx.context.thread, "a hidden note"))


@tool
async def show_card(ctx: Context) -> None:
    """Show a card, a task and a workflow, and leave a hidden note."""
    context = ctx.context
    await context.stream_widget(Card(children=[Text(id="t", value="a card")]))
    task = types.CustomTask(title="a task", content="done")
    item = types.TaskItem(**place(context.thread), task=task)
    await context.stream(types.ThreadItemDoneEvent(item=item))
    await leave_note(ctx)
    await context.start_workflow(types.Workflow(type="custom", tasks=[]))
    await context.add_workflow_task(types.CustomTask(title="a step", content="taken"))
    await context.end_workflow()


@tool
async def last_card(ctx: Context) -> str:
    """Show a card, which ends the turn."""
    await ctx.context.stream_widget(Card(children=[Text(value="a card")]))
    return "the card was shown"


@tool
async def three_steps(ctx: Context, end: bool = True) -> None:
    """Show a workflow of three steps, which the next message ends, or this tool."""
    for title in ("plan", "search", "read"):
        await ctx.context.add_workflow_task(types.CustomTask(title=title, content=f"{title} it"))
    if end:
        await ctx.context.end_workflow()


@tool
async def replace_card(ctx: Context) -> None:
    """Show a card that is not done yet, and another in its place."""
    added, replaced = types.ThreadItemAddedEvent, types.ThreadItemReplacedEvent
    facts = place(ctx.context.thread)
    for event, text in ((added, "the first card"), (replaced, "the second card")):
        card = Card(children=[Text(value=text)])
        await ctx.context.stream(event(item=types.WidgetItem(**facts, widget=card)))


@partial(tool, failure_error_function=None)
async def growing_card(ctx: Context, end: str) -> None:
    """Show a card whose text grows, until the user leaves or a bug ends it."""

    async def states():
        for text in ("one ", "one two "):
            yield Card(children=[Text(id="t", value=text, streaming=True)])
        if end == "bug":
            raise ZeroDivisionError("a bug in a widget")
        await asyncio.Event().wait()

    await ctx.context.stream_widget(states())


@tool
async def quote_a_page(ctx: Context) -> None:
    """Show a message with a source, which is not done."""
    item = types.AssistantMessageItem(**place(ctx.context.thread), content=[])
    await ctx.context.stream(types.ThreadItemAddedEvent(item=item))
    text = types.AssistantMessageContent(text="a page says")
    source = types.Annotation(source=types.URLSource(url="https://a.example", title="it"), index=3)
    added = types.AssistantMessageContentPartAdded(content_index=0, content=text)
    cited = types.AssistantMessageContentPartAnnotationAdded
    cited = cited(content_index=0, annotation_index=0, annotation=source)
    for update in (added, cited):
        await ctx.context.stream(types.ThreadItemUpdatedEvent(item_id=item.id, update=update))


@tool
async def end_thread(ctx: Context, how: str) -> None:
    """Lock the thread, or close it without a reason."""
    locked, closed = types.LockedStatus(reason="The shop is closed."), types.ClosedStatus()
    ctx.context.thread.status = locked if how == "locked" else closed


@output_guardrail
async def no_secrets(ctx, agent, output) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="forbidden" in str(output))


THINKING = main.ModelSettings(reasoning=Reasoning(effort="low"))
second = Agent("Second", instructions="You are the second agent.")
agent.handoffs = [second]
for name, model in json.loads(os.environ.get("OTHERS", "{}")).items():
    settings = THINKING if "claude" in model else main.ModelSettings()
    agent.handoffs.append(Agent(f"Other {name}", model=model, model_settings=settings))
agent.tools.append(second.as_tool("ask_second", "Ask the second agent."))
agent.tool_use_behavior = StopAtTools(stop_at_tool_names=["pick_colour", "last_card"])
agent.output_guardrails = [no_secrets]
agent.model = ThinkingModel(main.model.model)
settings = main.ModelSettings(max_tokens=1_000)  # nothing else may get lost
agent.model_settings = THINKING if "THINKING" in os.environ else settings


async def run_config_for(thread, input, context):
    model = main.message_text(input).partition(" via ")[2] if input else ""
    return replace(main.server.run_config, model=model or None)


main.server.run_config_for = run_config_for


async def act(thread, action, sender, context):
    if action.type == "refuse":
        raise CustomStreamError("You cannot do this now.", allow_retry=False)
    if action.type == "break":
        raise ZeroDivisionError("a bug in an action")
    if action.type == "respond":
        async for event in main.server.respond(thread, None, context):
            yield event
    else:
        yield hidden(thread, "You clicked.")


main.server.action = act


async def image(attachment) -> dict:
    return {"type": "input_image", "detail": "auto", "image_url": IMAGE}


main.server.converter.attachment_to_message_content = image


async def add_thread_item(thread_id, item, context, add=main.store.add_thread_item):
    await asyncio.sleep(0)  # a database would wait here, and a cancellation arrive
    if "more than the disk holds" in str(item):
        raise OSError("the disk is full")
    await add(thread_id, item, context)


async def save_thread(thread, context, save=main.store.save_thread):
    if thread.title == "no title":
        raise OSError("the title was not saved")
    await save(thread, context)


main.store.add_thread_item, main.store.save_thread = add_thread_item, save_thread


def completion(*args, original=main.litellm.main.completion, **kwargs):
    """LiteLLM prepares a request in a thread; some take their time."""
    if "slow to prepare" not in str(kwargs["messages"]):
        return original(*args, **kwargs)
    print("preparing", flush=True)
    time.sleep(0.3)
    request = original(*args, **kwargs)
    print("prepared", flush=True)
    return request


main.litellm.main.completion = completion
app = main.app


@app.post("/hidden/{thread_id}")
async def add_hidden_item(thread_id: str, request: Request):
    item = hidden(await main.server.store.load_thread(thread_id, {}), await request.json()).item
    await main.server.store.add_thread_item(thread_id, item, {})


@app.post("/image")
async def keep_image() -> str:
    id = main.store.generate_item_id("attachment", None, {})
    facts = {"name": "a.png", "mime_type": "image/png", "preview_url": "https://a.example/a.png"}
    await main.store.save_attachment(types.ImageAttachment(id=id, **facts), {})
    return id


@app.get("/collect")
async def collect():
    return gc.collect()  # so that what asyncio has to complain of comes into the log


if __name__ == "__main__":
    main.serve()
