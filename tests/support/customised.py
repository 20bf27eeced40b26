"""The server as a user of the file would extend it: tools, a guardrail, a faster heartbeat.

Run in main.py's place (main.py is imported, its names are used); the agent's tools are what
the scripts in the tests call.
"""

import asyncio
import gc
import os
import time
from datetime import datetime

from agents import (
    Agent,
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
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.errors import CustomStreamError
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    CustomTask,
    HiddenContextItem,
    TaskItem,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    WidgetItem,
    Workflow,
)
from chatkit.widgets import Card, Text
from fastapi import Request
from mcp.types import CallToolResult, TextContent
from mcp.types import Tool as MCPTool

import main

Context = RunContextWrapper[AgentContext]


@function_tool
async def clock() -> str:
    """Tell the time."""
    return "noon"


@function_tool
async def pick_colour(ctx: Context, hint: str) -> str:
    """Ask the browser for a colour."""
    ctx.context.client_tool_call = ClientToolCall(name="pick_colour", arguments={"hint": hint})
    return "asked"


@function_tool
async def ask_page(ctx: Context) -> str:
    """Ask the browser under another name than the tool's."""
    ctx.context.client_tool_call = ClientToolCall(name="choose", arguments={"hint": "warm"})
    return "asked"


@function_tool
async def show_card(ctx: Context) -> str:
    """Show a card, a task and a workflow, and leave a hidden note."""
    context = ctx.context
    await context.stream_widget(Card(children=[Text(id="t", value="a card")]))
    task = TaskItem(
        id=context.generate_id("task"),
        thread_id=context.thread.id,
        created_at=context.thread.created_at,
        task=CustomTask(title="a task", content="done"),
    )
    note = HiddenContextItem(
        id=context.generate_id("message"),
        thread_id=context.thread.id,
        created_at=context.thread.created_at,
        content="a hidden note",
    )
    await context.stream(ThreadItemDoneEvent(item=task))
    await context.stream(ThreadItemDoneEvent(item=note))
    await context.start_workflow(Workflow(type="custom", tasks=[]))
    await context.add_workflow_task(CustomTask(title="a step", content="taken"))
    await context.end_workflow()
    return "shown"


@function_tool
async def three_steps(ctx: Context) -> str:
    """Show a workflow of three steps, as they are taken."""
    for title in ("plan", "search", "read"):
        await ctx.context.add_workflow_task(CustomTask(title=title, content=f"{title} it"))
    return "taken"


@function_tool
async def replace_card(ctx: Context) -> str:
    """Show a card that is not done yet, and another in its place."""
    context = ctx.context
    item = WidgetItem(
        id=context.generate_id("message"),
        thread_id=context.thread.id,
        created_at=context.thread.created_at,
        widget=Card(children=[Text(value="the first card")]),
    )
    await context.stream(ThreadItemAddedEvent(item=item))
    item = item.model_copy(update={"widget": Card(children=[Text(value="the second card")])})
    await context.stream(ThreadItemReplacedEvent(item=item))
    return "replaced"


@function_tool(failure_error_function=None)
async def growing_card(ctx: Context, end: str) -> str:
    """Show a card whose text grows, until the user leaves or a bug ends it."""

    async def states():
        for text in ("one ", "one two "):
            yield Card(children=[Text(id="t", value=text, streaming=True)])
        if end == "bug":
            raise ZeroDivisionError("a bug in a widget")
        await asyncio.Event().wait()

    await ctx.context.stream_widget(states())
    return "grown"


@function_tool(failure_error_function=None)
async def broken() -> str:
    """A tool with a bug."""
    raise ZeroDivisionError("a bug in a tool")


@function_tool(failure_error_function=None)
async def broken_database() -> str:
    """A tool whose own connection timed out, which the provider did not cause."""
    raise TimeoutError("the tool's database was silent")


@function_tool
async def slow() -> str:
    """A tool that takes its time."""
    await asyncio.sleep(float(os.environ.get("SLOW_TOOL", "1")))
    return "finally"


@function_tool
def slow_in_a_thread() -> str:
    """A tool that no cancellation reaches."""
    time.sleep(1)
    return "finally"


@function_tool
async def stock(city: str) -> str:
    """List what a shop has."""
    return f"{city}: A=4711, B=4712"


@function_tool
async def divide(number: int) -> str:
    """Divide by a number, which fails for zero."""
    return f"{1 / number}"


@function_tool
async def report(length: int) -> str:
    """Write a long report."""
    return "the start " + "x" * length + " the end"


@function_tool
async def pictures() -> list:
    """Return a text, an image and a file."""
    return [
        ToolOutputText(text="two things"),
        ToolOutputImage(image_url="data:image/png;base64,iVBORw0KGgo="),
        ToolOutputFileContent(file_data="JVBERi0xLjQ=", filename="plan.pdf"),
    ]


@function_tool
async def half_a_pair() -> str:
    """Return half of a surrogate pair."""
    return "half \ud83d"


@function_tool
async def password() -> str:
    """Tell the password, which must not be kept."""
    return "open sesame"


class Almanac(MCPServer):
    """An MCP server with one tool."""

    name = "almanac"

    async def connect(self):
        pass

    async def cleanup(self):
        pass

    async def list_prompts(self):
        raise NotImplementedError

    async def get_prompt(self, name, arguments=None):
        raise NotImplementedError

    async def list_tools(self, run_context=None, agent=None):
        schema = {"type": "object", "properties": {"day": {"type": "string"}}}
        return [MCPTool(name="sunrise", description="Tell the sunrise.", inputSchema=schema)]

    async def call_tool(self, tool_name, arguments, meta=None):
        text = TextContent(type="text", text=f"{arguments['day']}: 06:12")
        return CallToolResult(content=[text])


second = Agent("Second", instructions="You are the second agent.")


async def on_stream(event) -> None:
    """Have the second agent stream: the tests' provider does nothing else."""


@output_guardrail
async def no_secrets(ctx, agent, output) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered="forbidden" in str(output))


class Hooks(main.ToolMemory):
    """Hooks of the application."""

    async def on_tool_start(self, context, agent, tool):
        await super().on_tool_start(context, agent, tool)
        if tool.name in ("slow", "slow_in_a_thread", "stock"):
            print(f"{tool.name} starts in {context.context.thread.id}", flush=True)


main.server.hooks = Hooks


def hidden(thread_id: str, content, context) -> HiddenContextItem:
    return HiddenContextItem(
        id=main.store.generate_item_id("message", None, context),
        thread_id=thread_id,
        created_at=datetime.now(),
        content=content,
    )


async def hidden_context_to_input(item, convert=main.server.converter.hidden_context_to_input):
    if item.content == "what no converter knows":
        raise NotImplementedError(f"secret words of {item.content}")
    return await convert(item)


main.server.converter.hidden_context_to_input = hidden_context_to_input
# A copy may have tools of these names already.
main.server.agent.tools = [
    clock,
    pick_colour,
    ask_page,
    show_card,
    three_steps,
    replace_card,
    growing_card,
    broken,
    broken_database,
    slow,
    slow_in_a_thread,
    stock,
    divide,
    report,
    pictures,
    half_a_pair,
    password,
    second.as_tool("ask_second", "Ask the second agent.", on_stream=on_stream),
]
main.server.agent.mcp_servers.append(Almanac())
main.server.agent.handoffs.append(second)
main.server.forgotten_tools.add("password")
main.server.agent.tool_use_behavior = StopAtTools(stop_at_tool_names=["pick_colour", "ask_page"])
main.server.agent.output_guardrails.append(no_secrets)


async def act(thread, action, sender, context):
    """What a click on a widget does."""
    if action.type == "refuse":
        raise CustomStreamError("You cannot do this now.", allow_retry=False)
    if action.type == "break":
        raise ZeroDivisionError("a bug in an action")
    item = AssistantMessageItem(
        id=main.store.generate_item_id("message", thread, context),
        thread_id=thread.id,
        created_at=thread.created_at,
        content=[AssistantMessageContent(text="You clicked.")],
    )
    yield ThreadItemDoneEvent(item=item)


main.server.action = act


async def add_thread_item(thread_id, item, context, add=main.store.add_thread_item):
    if "more than the disk holds" in str(item):
        raise OSError("the disk is full")
    await add(thread_id, item, context)


async def save_thread(thread, context, save=main.store.save_thread):
    if thread.title == "no title":
        raise OSError("the title was not saved")
    await save(thread, context)


async def load_thread_items(
    thread_id, after, limit, order, context, load=main.store.load_thread_items
):
    page = await load(thread_id, after, limit, order, context)
    if (limit, order) == (main.HISTORY_ITEMS, "desc") and "no history" in str(page):
        raise OSError("the history was not read")
    return page


main.store.add_thread_item = add_thread_item
main.store.save_thread = save_thread
main.store.load_thread_items = load_thread_items


def completion(*args, original=main.litellm.main.completion, **kwargs):
    """LiteLLM prepares a request in a thread; some take their time."""
    if "a mistake in the server" in str(kwargs["messages"][-1]):
        raise TypeError("customised.py is wrong")
    slow = "slow to prepare" in str(kwargs.get("messages"))
    if slow:
        print("preparing", flush=True)
        time.sleep(0.3)
    try:
        return original(*args, **kwargs)
    finally:
        if slow:
            print("prepared", flush=True)


main.litellm.main.completion = completion
main.SILENCE_SECONDS = float(os.environ.get("SILENCE_SECONDS", main.SILENCE_SECONDS))


app = main.app


@app.post("/hidden/{thread_id}")
async def add_hidden_item(thread_id: str, request: Request):
    """Put a hidden item of the application's own into a thread."""
    item = hidden(thread_id, await request.json(), {})
    await main.server.store.add_thread_item(thread_id, item, {})


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
