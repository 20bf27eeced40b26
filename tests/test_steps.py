"""Thoughts, steps and widgets: each is shown, stored and told once.

It is so after a stop and after a fault, too.
"""

from contextlib import nullcontext
from datetime import datetime
from types import SimpleNamespace

import pytest
from chatkit.types import (
    Annotation,
    AssistantMessageContent,
    ThreadItemAddedEvent,
    URLSource,
)

from client import Chat, done, error_of, items_shown, outline
from provider import Cut, Failure, Silence, Text, Thought, ToolCall

NOW = datetime(2026, 1, 1)
TASKS = ["First, look. ", "plan it", "search it", "read it", "Then think. "]
THOUGHT = [Thought("Then "), Thought("think. ")]
# How a turn ends: the provider's second answer, the text at which the client leaves, and the number
# of tasks. chatkit shows a thought that is not the first one of its workflow when it is complete.
ENDS = {
    "done": ([*THOUGHT, Text("Taken.")], None, 5),
    "stopped": ([*THOUGHT, Text("Tak"), Silence()], '"Tak"', 5),
    "fault": ([*THOUGHT, Text("Tak"), Cut()], None, 5),
    "stopped after a step": ([Silence()], '"read it"', 4),
    "fault after a step": ([Failure("rate")], None, 4),
    "fault in a thought": ([*THOUGHT, Cut()], None, 4),
}


def read(chat: Chat, server, text: str, leave_at: str | None) -> list:
    """The events of the turn, or those until one holds `leave_at`, when the client leaves."""
    events = []
    stream = chat.start(text)
    for event in stream:
        events.append(event)
        if leave_at and leave_at in event.model_dump_json():
            break
    stream.close()
    server.wait_for(f"thread={chat.thread_id} ", seconds=10)
    return events


@pytest.mark.parametrize("end", ENDS)
def test_each_thought_and_each_step_is_there_once(custom_chat, customised, provider, end):
    answer, leave_at, count = ENDS[end]
    provider.script["go"] = [
        [Thought("First, "), Thought("look. "), ToolCall("three_steps")],
        answer,
    ]
    events = read(custom_chat, customised, "go", leave_at)
    assert [event.type for event in events].count("error") == (1 if "fault" in end else 0)
    (shown,) = [item for item in items_shown(events) if item["type"] == "workflow"]
    (stored,) = [item for item in custom_chat.items() if item["type"] == "workflow"]
    for workflow in (shown, stored):
        assert [task["content"] for task in workflow["workflow"]["tasks"]] == TASKS[:count]
    for item in done(events, "workflow"):
        assert [task.content for task in item.workflow.tasks] == TASKS[:count]
    assert len(done(events, "workflow")) == (0 if end == "stopped after a step" else 1)
    assert outline(custom_chat.items()) == outline(items_shown(events))

    custom_chat.say("and on")
    told = "\n".join(text for _, text in provider.requests[-1].messages)
    assert [told.count(f"{step}: {step} it") for step in ("plan", "search", "read")] == [1, 1, 1]
    assert [told.count(thought) for thought in ("look. ", "think. ")] == [0, 0]


def test_a_replaced_widget_is_stored_as_replaced(custom_chat, provider):
    provider.script["go"] = [[ToolCall("replace_card")], [Text("Look"), Cut()]]
    events = custom_chat.say("go")
    assert "cut off" in error_of(events).message
    (replaced,) = [event.item for event in events if event.type == "thread.item.replaced"]
    (stored,) = [item for item in custom_chat.items() if item["type"] == "widget"]
    assert stored["id"] == replaced.id
    assert "the second card" in str(stored) and "the first card" not in str(stored)
    assert done(events, "widget") == []


@pytest.mark.parametrize("end", ["leave", "bug"])
def test_an_interrupted_widget_is_stored(custom_chat, customised, provider, end):
    """At least what was shown first of it, and once."""
    provider.script["go"] = [[ToolCall("growing_card", {"end": end})], [Text("Grown.")]]
    events = read(custom_chat, customised, "go", '"two "' if end == "leave" else None)
    added = next(event.item for event in events if event.type == "thread.item.added")
    assert "two " in str(events)
    assert [item["type"] for item in custom_chat.items()] == ["user_message", "widget"]
    stored = custom_chat.items()[1]
    assert stored["id"] == added.id and "one " in str(stored["widget"])
    if end == "bug":
        assert error_of(events).code == "stream.error"
        assert "ZeroDivisionError: a bug in a widget" in "\n".join(customised.log)


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["stop", "fault"])
async def test_what_the_stage_of_unfinished_items_completes(main, end):
    """It completes what is shown and unfinished, and nothing that nobody has seen."""

    def item(id: str):
        return main.AssistantMessageItem(id=id, thread_id="thr_1", created_at=NOW, content=[])

    async def events():
        for id in ("done", "removed", "unfinished"):
            yield ThreadItemAddedEvent(item=item(id))
        yield main.ThreadItemDoneEvent(item=item("done"))
        yield main.ThreadItemRemovedEvent(item_id="removed")
        if end == "fault":
            raise ZeroDivisionError
        turn.stopped = True
        yield ThreadItemAddedEvent(item=item("after the stop"))
        yield main.ThreadItemDoneEvent(item=item("after the stop"))

    turn = SimpleNamespace(stopped=False)
    found = []
    with pytest.raises(ZeroDivisionError) if end == "fault" else nullcontext():
        async for event in main.with_unfinished_items(events(), turn):
            found.append((event.type, getattr(event, "item_id", None) or event.item.id))
    assert found[3:] == [
        ("thread.item.done", "done"),
        ("thread.item.removed", "removed"),
        ("thread.item.done", "unfinished"),
    ]


def test_an_unfinished_message_is_what_the_client_shows(main):
    """Text, annotations and all parts."""
    source = URLSource(url="https://example.com", title="a page")
    annotation = Annotation(source=source, index=3)
    one, two, whole = (AssistantMessageContent(text=text) for text in ("", "", "one, two"))
    shown = main.AssistantMessageItem(id="msg_1", thread_id="thr_1", created_at=NOW, content=[])
    for update in (
        main.AssistantMessageContentPartAdded(content_index=0, content=one),
        main.AssistantMessageContentPartTextDelta(content_index=0, delta="one"),
        main.AssistantMessageContentPartAnnotationAdded(
            content_index=0, annotation_index=0, annotation=annotation
        ),
        main.AssistantMessageContentPartTextDelta(content_index=0, delta=", tw"),
        main.AssistantMessageContentPartDone(content_index=0, content=whole),
        main.AssistantMessageContentPartAdded(content_index=1, content=two),
        main.AssistantMessageContentPartTextDelta(content_index=1, delta="thr"),
    ):
        main.extend_message(shown, update)
    assert shown.content == [
        AssistantMessageContent(text="one, two", annotations=[annotation]),
        AssistantMessageContent(text="thr"),
    ]
