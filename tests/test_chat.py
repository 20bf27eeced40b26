"""What is shown is stored, once, under its id, after a stop and an error, too.

With --postgres the servers are two workers.
"""

import asyncio

import agents
import pytest

from client import Local, done, error_of, items_shown, leave, message, outline, text_of
from provider import Cut, Failure, Finish, Silence, Text, Thought, ToolCall

GUARDED = ("Input", "Output", "ToolInput", "ToolOutput")
GUARDRAILS = {getattr(agents, f"{kind}GuardrailTripwireTriggered") for kind in GUARDED}
one_provider = pytest.mark.parametrize("provider_name", ["openai"])


def test_every_item_is_stored_once_under_the_id_that_was_streamed(custom_chat, provider):
    chat, events = custom_chat, []
    warm, cold = (ToolCall("pick_colour", {"hint": hint}) for hint in ("warm", "cold"))
    provider.script |= {
        "use a tool": [[Text("Let me "), Text("look. "), ToolCall("clock")], [Text("It is noon.")]],
        "two colours": [[Text("Choose. "), warm], [cold], [Text("Fine.")]],
    }
    for text in provider.script:
        events += chat.say(text)
    for colour in ("red", "blue"):
        events += chat.answer(colour)

    assert "error" not in [event.type for event in events]
    stored = chat.items()
    streamed = [event.item.id for event in events if event.type == "thread.item.done"]
    assert [item["id"] for item in stored] == streamed and len(set(streamed)) == 8
    calls = [item for item in stored if item["type"] == "client_tool_call"]
    messages = [item for item in stored if item not in calls]
    assert stored == [*messages[:5], *calls, messages[5]]
    texts = ["use a tool", "Let me look. ", "It is noon.", "two colours", "Choose. ", "Fine."]
    assert [text_of(item) for item in messages] == texts
    answers = [(call["arguments"]["hint"], call["output"], call["status"]) for call in calls]
    assert answers == [("warm", "red", "completed"), ("cold", "blue", "completed")]
    assert not provider.open()


TASKS = ["First, look. ", "plan it", "search it", "read it"]
# How a turn ends: the provider's second answer, and the text at which the client leaves.
ENDS = {
    "done": ([Text("Taken.")], ""),
    "stopped": ([Text("Tak"), Silence()], '"Tak"'),
    "error": ([Text("Tak"), Cut()], ""),
    "stopped after a step": ([Silence()], '"read it"'),
    "error after a step": ([Failure("rate")], ""),
}


@one_provider
@pytest.mark.parametrize("end", ENDS)
def test_each_thought_and_each_step_is_there_once(custom_chat, customised, provider, end):
    answer, leave_at = ENDS[end]
    thought, gate = [Thought("First, "), Thought("look. ")], Silence()
    provider.script["go"] = [[*thought, gate, ToolCall("three_steps", {"end": False})], answer]
    events = leave(custom_chat.start("go"), leave_at or "nothing", {"look. ": gate})
    customised.wait_for(f"thread={custom_chat.thread_id} ")
    assert [event.type for event in events].count("error") == ("error" in end)
    shown, stored = items_shown(events), custom_chat.items()
    assert [item["id"] for item in stored] == [item["id"] for item in shown]
    assert outline(stored) == outline(shown)
    assert outline(stored).partition("[message]")[0] == "[workflow]" + "|".join(TASKS)
    for item in done(events, "workflow"):
        assert [task.content for task in item.workflow.tasks] == TASKS
    assert len(done(events, "workflow")) == (end != "stopped after a step")

    custom_chat.say("and on")
    told = "\n".join(text for _, text in provider.requests[-1].messages)
    assert [told.count(f"{step}: {step} it") for step in ("plan", "search", "read")] == [1, 1, 1]


@one_provider
def test_widgets_tasks_and_hidden_notes_keep_their_ids_and_reach_the_model(custom_chat, provider):
    provider.script["show me"] = [[ToolCall("show_card")], [Text("There.")]]
    events = custom_chat.say("show me")
    kinds = ["user_message", "widget", "task", "workflow", "assistant_message"]
    assert [item["type"] for item in custom_chat.items()] == kinds
    hidden = [item["type"] for item in custom_chat.debug()].count("HiddenContextItem")
    assert hidden == 2  # the note, and the tool's call
    for kind in ("widget", "task", "workflow"):
        assert done(events, kind)[0].id == custom_chat.items()[kinds.index(kind)]["id"]

    custom_chat.say("and now?")
    told = "\n".join(text for _, text in provider.requests[-1].messages)
    for text in ("a card", "a task: done", "<HiddenContext>\na hidden note", "a step: taken"):
        assert told.count(text) == 1, told


# The tool, what of it is stored, and what is not.
INTERRUPTED = {
    "replaced": (ToolCall("replace_card"), "the second card", "the first card"),
    "left": (ToolCall("growing_card", {"end": "leave"}), "one ", "nothing"),
    "a bug": (ToolCall("growing_card", {"end": "bug"}), "one ", "nothing"),
    "a source": (ToolCall("quote_a_page"), "'index': 3}], 'text': 'a page says'", "nothing"),
}


@one_provider
@pytest.mark.parametrize("end", INTERRUPTED)
def test_an_interrupted_item_is_stored(custom_chat, customised, provider, end):
    """At least what was shown first of it, and once."""
    tool, holds, lacks = INTERRUPTED[end]
    provider.script["go"] = [[tool], [Cut()]]
    events = leave(custom_chat.start("go"), '"two "' if end == "left" else "nothing")
    customised.wait_for(f"thread={custom_chat.thread_id} ")
    _, stored = custom_chat.items()
    (shown,) = [event.item for event in events if event.type == "thread.item.added"]
    assert (stored["id"], stored["type"]) == (shown.id, shown.type)
    assert holds in str(stored) and lacks not in str(stored)
    if end == "a bug":
        assert error_of(events).code == "stream.error"
        customised.wait_for("ZeroDivisionError: a bug in a widget")


ANSWERING = ("play_sound", "give_notice", "three_steps", "replace_card")


@one_provider
@pytest.mark.parametrize("tool", [*ANSWERING, "leave_note"])
def test_what_counts_as_an_answer(custom_chat, provider, main, tool):
    """What a tool shows. Not a hidden note, nor thoughts and white space before it."""
    provider.script["go"] = [[Thought("Hm."), Text(" \n"), ToolCall(tool)], [Finish()]]
    errors = [event.message for event in custom_chat.say("go") if event.type == "error"]
    assert errors == [main.EMPTY_REPLY.message] * (tool not in ANSWERING)


@one_provider
def test_a_guardrail_takes_back_the_turn(custom_chat, provider, main):
    """Its messages and its tool calls. The question stays in the thread, and is not told again."""
    custom_chat.say("hello")
    before = custom_chat.debug()
    look, gate = [Text("Let me see. "), ToolCall("clock")], Silence()
    provider.script["tell me"] = [look, [Text("the forbidden word"), gate]]
    events = leave(custom_chat.start("tell me"), "nothing", {"forbidden": gate})
    shown = [event.item.id for event in events if event.type == "thread.item.added"]
    removed = [event.item_id for event in events if event.type == "thread.item.removed"]
    assert len(shown) == 2 and removed == shown
    error = error_of(events)
    says = [kind.message for kind in main.CHAT_ERRORS if {*kind.classes} >= GUARDRAILS]
    assert ([error.message], error.allow_retry) == (says, False)
    kept = custom_chat.debug()
    assert kept[:-2] == before and kept[-2]["content"] == ["tell me"]
    custom_chat.say("go on")  # the guardrail would refuse the question again
    assert provider.requests[-1].messages[2:] == [("user", "go on")]


async def test_a_guardrail_takes_back_an_unfinished_message(main, provider):
    @agents.input_guardrail
    async def never(ctx, agent, input) -> agents.GuardrailFunctionOutput:
        await streams.wait()
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    streams, silence = asyncio.Event(), Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two "), Text("three")]]
    local = Local(main, provider, input_guardrails=[never])
    async for event in await local.start("go"):
        if b'"one "' in event:
            streams.set()
            silence.end.set()
    assert [item.type for item in await local.items()] == ["user_message", "hidden_context_item"]


async def test_a_guardrail_takes_back_a_turn_without_a_message(main, provider):
    """chatkit would tell the client to remove `__fake_id__`."""

    @agents.output_guardrail
    async def never(ctx, agent, output) -> agents.GuardrailFunctionOutput:
        return agents.GuardrailFunctionOutput(output_info=None, tripwire_triggered=True)

    @agents.function_tool
    def clock() -> str:
        return "noon"

    provider.script["go"] = [[ToolCall("clock")]]
    ends = {"tools": [clock], "tool_use_behavior": "stop_on_first_tool"}
    events = await Local(main, provider, output_guardrails=[never], **ends).say("go")
    assert "thread.item.removed" not in [event.type for event in events]


@one_provider
def test_a_thread_is_named_after_its_first_message(custom_chat, provider, main):
    chat = custom_chat
    first = chat.say("  What is\n\nthe   weather " + "like " * 30)
    titles = [event.thread.title for event in first if event.type == "thread.updated"]
    assert titles == [("What is the weather " + "like " * 30)[: main.TITLE_LENGTH]]
    chat.say("something else")
    assert chat.thread()["title"] == titles[0]
    chat.get("threads.update", thread_id=chat.thread_id, title="mine")
    chat.say("and more")
    assert chat.thread()["title"] == "mine"


@one_provider
@pytest.mark.parametrize(
    ("how", "reason"), [("locked", "The shop is closed."), ("closed", "This thread is closed.")]
)
def test_a_thread_that_has_ended(custom_chat, provider, how, reason):
    chat = custom_chat
    provider.script["end it"] = [[ToolCall("end_thread", {"how": how})], [Text("Bye.")]]
    chat.say("end it")
    stored = chat.debug()
    for type, params in (
        ("threads.add_user_message", {"input": message("still there?")}),
        ("threads.retry_after_item", {"item_id": chat.items()[0]["id"]}),
    ):
        response = chat.post(type, thread_id=chat.thread_id, **params)
        assert (response.status_code, response.json()) == (409, {"detail": reason})
    assert chat.debug() == stored
    assert chat.thread()["status"]["type"] == how
