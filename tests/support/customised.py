"""The server as a user of the file would extend it: tools, agents, guardrails, actions, a store.

Run in main.py's place (main.py is imported, its names are used); the agent's tools are what the
scripts in the tests call. Some of the tools and of the store's methods fail when they are told to.
A message that ends with "via PROVIDER/MODEL" is answered by that model.
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
    AgentHooks,
    GuardrailFunctionOutput,
    RunContextWrapper,
    StopAtTools,
    ToolOutputFileContent,
    ToolOutputImage,
    ToolOutputText,
    function_tool,
    output_guardrail,
)
from agents.mcp import MCPServer
from chatkit import types
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.errors import CustomStreamError
from chatkit.widgets import Card, Text
from fastapi import Request
from mcp.types import CallToolResult, TextContent
from mcp.types import Tool as MCPTool
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
agent = main.server.agent
agent.tools = []  # a copy may have tools of these names


def tool(function, **options):
    """Give the agent a tool."""
    agent.tools.append(function_tool(function, **options))
    return function


raising = partial(tool, failure_error_function=None)


def place(thread) -> dict:
    """What every item has."""
    id = main.store.generate_item_id("message", thread, {})
    return {"id": id, "thread_id": thread.id, "created_at": datetime.now()}


# ---- Tools that answer --------------------------------------------------------------------------


@tool
async def clock() -> str:
    return "noon"


@tool
async def stock(city: str) -> str:
    return f"{city}: A=4711, B=4712"


OUTPUTS = {
    "report": "the start " + "x" * 200_000 + " the end",
    "two texts": [ToolOutputText(text="one text"), ToolOutputText(text="another")],
    "half a pair": "half \ud83d",  # of surrogates
    "pictures": [
        ToolOutputText(text="two things"),
        ToolOutputImage(image_url="data:image/png;base64,iVBORw0KGgo="),
        ToolOutputFileContent(file_data="JVBERi0xLjQ=", filename="plan.pdf"),
    ],
}


@tool
async def give(what: str):
    return OUTPUTS[what]


@tool
async def password() -> str:
    return "open sesame"


@tool
async def slow() -> None:
    """A tool that does not end by itself."""
    await asyncio.Event().wait()


@tool
def slow_in_a_thread() -> None:
    """A tool that no cancellation reaches."""
    time.sleep(1)


@raising
async def broken() -> None:
    """A tool whose own connection timed out, which the provider did not cause."""
    raise TimeoutError("the database was silent")


@tool
async def pick_colour(ctx: Context, hint: str) -> str:
    """Ask the browser for a colour."""
    ctx.context.client_tool_call = ClientToolCall(name="pick_colour", arguments={"hint": hint})
    return "asked"


@tool
async def ask_page(ctx: Context) -> str:
    """Ask the browser under another name than the tool's."""
    ctx.context.client_tool_call = ClientToolCall(name="choose", arguments={"hint": "warm"})
    return "asked"


# ---- Tools that show something ------------------------------------------------------------------


@tool
async def play_sound(ctx: Context) -> None:
    await ctx.context.stream(types.ClientEffectEvent(name="sound", data={"of": "a bell"}))


@tool
async def give_notice(ctx: Context) -> None:
    await ctx.context.stream(types.NoticeEvent(level="info", message="Look up.", title=None))


@tool
async def leave_note(ctx: Context) -> None:
    note = types.HiddenContextItem(**place(ctx.context.thread), content="a hidden note")
    await ctx.context.stream(types.ThreadItemDoneEvent(item=note))


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
    texts = ("the first card", "the second card")
    first, second = (Card(children=[Text(value=text)]) for text in texts)
    card = types.WidgetItem(**place(ctx.context.thread), widget=first)
    await ctx.context.stream(types.ThreadItemAddedEvent(item=card))
    card = card.model_copy(update={"widget": second})
    await ctx.context.stream(types.ThreadItemReplacedEvent(item=card))


@raising
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


# ---- Agents, guardrails, hooks ------------------------------------------------------------------


class Almanac(MCPServer):
    """An MCP server with one tool."""

    name = "almanac"
    connect = cleanup = list_prompts = get_prompt = None

    async def list_tools(self, run_context=None, agent=None):
        schema = {"type": "object", "properties": {"day": {"type": "string"}}}
        return [MCPTool(name="sunrise", description="Tell the sunrise.", inputSchema=schema)]

    async def call_tool(self, tool_name, arguments, meta=None):
        text = TextContent(type="text", text=f"{arguments['day']}: 06:12")
        return CallToolResult(content=[text])


@output_guardrail
async def no_secrets(ctx, agent, output) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="forbidden" in str(output))


class Hooks(AgentHooks):
    async def on_tool_start(self, context, agent, tool):
        if tool.name.startswith("slow"):
            print(f"{tool.name} starts in {context.context.thread.id}", flush=True)


THINKING = main.ModelSettings(reasoning=Reasoning(effort="low"))
ENDING = ["pick_colour", "ask_page", "last_card"]
second = Agent("Second", instructions="You are the second agent.")
agent.handoffs = [second]
for name, model in json.loads(os.environ.get("OTHERS", "{}")).items():
    settings = THINKING if name == "Claude" else main.ModelSettings()
    agent.handoffs.append(Agent(f"Other {name}", model=model, model_settings=settings))
agent.tools.append(second.as_tool("ask_second", "Ask the second agent."))
agent.mcp_servers = [Almanac()]
agent.tool_use_behavior = StopAtTools(stop_at_tool_names=ENDING)
agent.output_guardrails = [no_secrets]
agent.hooks = Hooks()
agent.model = ThinkingModel(main.model.model)
agent.model_settings = main.ModelSettings(max_tokens=1_000)  # nothing else may get lost
if "THINKING" in os.environ:
    agent.model_settings = THINKING
main.server.forgotten_tools.add("password")


async def run_config_for(thread, input, context):
    model = main.message_text(input).partition(" via ")[2] if input else ""
    return replace(main.server.run_config, model=model or None)


main.server.run_config_for = run_config_for


async def act(thread, action, sender, context):
    """What a click on a widget does."""
    if action.type == "refuse":
        raise CustomStreamError("You cannot do this now.", allow_retry=False)
    if action.type == "break":
        raise ZeroDivisionError("a bug in an action")
    note = types.HiddenContextItem(**place(thread), content="You clicked.")
    yield types.ThreadItemDoneEvent(item=note)


main.server.action = act


async def hidden_context_to_input(item, convert=main.server.converter.hidden_context_to_input):
    if item.content == "what no converter knows":
        raise NotImplementedError(f"secret words of {item.content}")
    return await convert(item)


async def image(attachment) -> dict:
    url = "data:image/png;base64,iVBORw0KGgo="
    return {"type": "input_image", "detail": "auto", "image_url": url}


main.server.converter.hidden_context_to_input = hidden_context_to_input
main.server.converter.attachment_to_message_content = image

# ---- The store ----------------------------------------------------------------------------------


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

# ---- LiteLLM, and routes of the tests -----------------------------------------------------------


def completion(*args, original=main.litellm.main.completion, **kwargs):
    """LiteLLM prepares a request in a thread; some take their time."""
    slow = "slow to prepare" in str(kwargs["messages"])
    if slow:
        print("preparing", flush=True)
        time.sleep(0.3)
    try:
        return original(*args, **kwargs)
    finally:
        if slow:
            print("prepared", flush=True)


main.litellm.main.completion = completion
app = main.app


@app.post("/hidden/{thread_id}")
async def add_hidden_item(thread_id: str, request: Request):
    """Put a hidden item of the application's own into a thread."""
    thread = await main.server.store.load_thread(thread_id, {})
    item = types.HiddenContextItem(**place(thread), content=await request.json())
    await main.server.store.add_thread_item(thread_id, item, {})


@app.post("/image")
async def keep_image() -> str:
    id = main.store.generate_item_id("attachment", None, {})
    facts = {"name": "a.png", "mime_type": "image/png", "preview_url": "https://a.example/a.png"}
    await main.store.save_attachment(types.ImageAttachment(id=id, **facts), {})
    return id


@app.get("/worker")
async def worker():
    """Which process answers on this connection."""
    return os.getpid()


@app.get("/collect")
async def collect():
    """Collect the garbage, so that what asyncio has to complain of comes into the log."""
    return gc.collect()


if __name__ == "__main__":
    main.serve()
