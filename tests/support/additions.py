"""The server with what people add to it: tools that show something, a second agent, a hook.

Run in main.py's place, with a store that can be told to fail. tests/test_additions.py drives it.
"""

import uvicorn
from agents import Agent, RunContextWrapper, StopAtTools, function_tool
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.types import (
    ClientEffectEvent,
    ClosedStatus,
    CustomTask,
    HiddenContextItem,
    LockedStatus,
    NoticeEvent,
    ThreadItemDoneEvent,
    ThreadItemReplacedEvent,
    WidgetItem,
)
from chatkit.widgets import Card, Text

import main

Context = RunContextWrapper[AgentContext]


@function_tool
async def play_sound(ctx: Context) -> str:
    """Have the browser do something."""
    await ctx.context.stream(ClientEffectEvent(name="sound", data={"of": "a bell"}))
    return "played"


@function_tool
async def give_notice(ctx: Context) -> str:
    """Show a line above the composer."""
    await ctx.context.stream(NoticeEvent(level="info", message="Look up.", title=None))
    return "given"


@function_tool
async def take_step(ctx: Context) -> str:
    """Show a workflow of one step."""
    await ctx.context.add_workflow_task(CustomTask(title="a step", content="taken"))
    await ctx.context.end_workflow()
    return "taken"


@function_tool
async def leave_note(ctx: Context) -> str:
    """Leave a note that the user does not see."""
    context = ctx.context
    note = HiddenContextItem(
        id=context.generate_id("message"),
        thread_id=context.thread.id,
        created_at=context.thread.created_at,
        content="a hidden note",
    )
    await context.stream(ThreadItemDoneEvent(item=note))
    return "left"


@function_tool
async def replace_card(ctx: Context) -> str:
    """Replace a card of an earlier turn."""
    context = ctx.context
    item = WidgetItem(
        id="wig_1",
        thread_id=context.thread.id,
        created_at=context.thread.created_at,
        widget=Card(children=[Text(value="a new card")]),
    )
    await context.stream(ThreadItemReplacedEvent(item=item))
    return "replaced"


@function_tool
async def end_thread(ctx: Context, how: str) -> str:
    """Lock the thread, or close it without a reason."""
    status = LockedStatus(reason="The shop is closed.") if how == "locked" else ClosedStatus()
    ctx.context.thread.status = status
    return "ended"


@function_tool
async def ask_browser(ctx: Context) -> str:
    """Ask the browser."""
    ctx.context.client_tool_call = ClientToolCall(name="ask_browser", arguments={})
    return "asked"


spanish = Agent("Spanish", instructions="Answer in Spanish.")
main.server.agent.handoffs.append(spanish)
spanish.handoffs.append(main.server.agent)
# Agents with models of other providers; there is no key for the last one.
for name, model in (
    ("Claude", "anthropic/claude-sonnet-4-6"),
    ("Gemini", "gemini/gemini-flash-latest"),
    ("Mistral", "mistral/m"),
):
    main.server.agent.handoffs.append(Agent(name, model=model))
# A copy may have tools of these names already.
main.server.agent.tools = [
    play_sound,
    give_notice,
    take_step,
    leave_note,
    replace_card,
    end_thread,
    ask_browser,
]
main.server.agent.tool_use_behavior = StopAtTools(stop_at_tool_names=["ask_browser"])


async def load_threads(limit, after, order, context, load=main.store.load_threads):
    if after == "broken":
        raise OSError("the disk is full of sk-secret")
    return await load(limit, after, order, context)


main.store.load_threads = load_threads

if __name__ == "__main__":
    uvicorn.run(main.app, host=main.HOST, port=main.PORT)
