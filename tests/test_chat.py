"""Conversations: ids, what is stored, and what the model is told."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from client import Chat, deltas, done, message, text_of
from conftest import PROVIDERS
from provider import Text, Thought, ToolCall


def turn(chat: Chat, provider, text: str, *replies: list) -> list:
    provider.script[text] = list(replies)
    return chat.say(text)


def test_every_item_is_stored_once_under_the_id_that_was_streamed(custom_chat, provider):
    chat, events = custom_chat, []
    for number in range(10):
        events += turn(
            chat, provider, f"turn {number}", [Text(f"reply {number}, "), Text("and more")]
        )
    events += turn(
        chat,
        provider,
        "use a tool",
        [Text("Let me "), Text("look. "), ToolCall("clock")],
        [Text("It is "), Text("noon.")],
    )
    warm, cold = (
        ToolCall("pick_colour", {"hint": "warm"}),
        ToolCall("pick_colour", {"hint": "cold"}),
    )
    events += turn(chat, provider, "two colours", [Text("Choose. "), warm], [cold], [Text("Fine.")])
    for colour in ("red", "blue"):
        events += chat.stream(
            "threads.add_client_tool_output", thread_id=chat.thread_id, result=colour
        )

    assert "error" not in [event.type for event in events]
    stored = chat.items()
    streamed = [event.item for event in events if event.type == "thread.item.done"]
    assert [item["id"] for item in stored] == [item.id for item in streamed]
    ids = [item.id for item in streamed]
    assert len(set(ids)) == len(ids) == 10 * 2 + 3 + 5
    assert all(id.startswith(("msg_", "tc_")) for id in ids), ids
    assert [item["type"] for item in stored[20:]] == [
        *["user_message", "assistant_message", "assistant_message"],
        *[
            "user_message",
            "assistant_message",
            "client_tool_call",
            "client_tool_call",
            "assistant_message",
        ],
    ]
    assert [text_of(item) for item in stored[20:23]] == [
        "use a tool",
        "Let me look. ",
        "It is noon.",
    ]
    for item in stored:
        if item["type"] == "assistant_message":
            assert deltas(events, item["id"]) == text_of(item) != ""
    calls = [item for item in stored if item["type"] == "client_tool_call"]
    assert [(call["arguments"]["hint"], call["output"]) for call in calls] == [
        ("warm", "red"),
        ("cold", "blue"),
    ]


def test_the_model_is_told_each_message_once_and_in_order(chat, provider, main):
    for text in ("one", "two", "three"):
        chat.say(text)
    assert provider.requests[-1].messages == [
        ("user", "one"),
        ("assistant", "You said: one"),
        ("user", "two"),
        ("assistant", "You said: two"),
        ("user", "three"),
    ]
    assert (
        provider.requests[-1].format.instructions(provider.requests[-1].body) == main.INSTRUCTIONS
    )


@pytest.mark.slow
def test_a_long_conversation_keeps_its_newest_part(servers, provider, main):
    """With each provider; at once, as this takes longer than any other test."""
    turns = main.HISTORY_ITEMS // 2 + 10

    def talk(name: str) -> None:
        chat = Chat(servers(name).url)
        for number in range(turns):
            chat.say(f"{name} {number}")

    with ThreadPoolExecutor() as pool:
        list(pool.map(talk, PROVIDERS))
    for name in PROVIDERS:
        (told,) = [
            told
            for told in (request.messages for request in provider.requests)
            if told[-1][1] == f"{name} {turns - 1}"
        ]
        assert told[-2] == ("assistant", f"You said: {name} {turns - 2}")
        # Items 2n and 2n + 1 of the thread are a question and its answer; the first is a question.
        first = 2 * turns - 1 - main.HISTORY_ITEMS
        first += first % 2
        assert told[0] == ("user", f"{name} {first // 2}")
        assert len(told) == 2 * turns - 1 - first


def test_reasoning_becomes_a_workflow_with_one_id(chat, provider):
    events = turn(chat, provider, "think", [Thought("Hm"), Thought(", well"), Text("Yes.")])
    assert [item["type"] for item in chat.items()] == [
        "user_message",
        "workflow",
        "assistant_message",
    ]
    (workflow,) = done(events, "workflow")
    added = [
        event.item.id
        for event in events
        if event.type == "thread.item.added" and event.item.type == "workflow"
    ]
    assert added == [workflow.id] == [chat.items()[1]["id"]]
    assert workflow.workflow.tasks[0].content == "Hm, well"
    updated = {event.item_id for event in events if event.type == "thread.item.updated"}
    assert updated == {workflow.id, done(events)[0].id}


def test_widgets_tasks_and_hidden_notes_keep_their_ids_and_reach_the_model(custom_chat, provider):
    events = turn(custom_chat, provider, "show me", [ToolCall("show_card")], [Text("There.")])
    kinds = ["user_message", "widget", "task", "workflow", "assistant_message"]
    assert [item["type"] for item in custom_chat.items()] == kinds
    assert [item["type"] for item in custom_chat.debug()] == [
        *[
            "UserMessageItem",
            "WidgetItem",
            "TaskItem",
            "HiddenContextItem",
            "WorkflowItem",
            "HiddenContextItem",  # the tool's call and output
            "AssistantMessageItem",
        ]
    ]
    for kind in ("widget", "task", "workflow"):
        assert done(events, kind)[0].id == custom_chat.items()[kinds.index(kind)]["id"]

    custom_chat.say("and now?")
    told = provider.requests[-1].messages
    everything = "\n".join(text for _, text in told)
    for text in ("a card", "a task: done", "<HiddenContext>\na hidden note", "a step: taken"):
        assert everything.count(text) == 1, told
    assert told[0] == ("user", "show me") and told[-1] == ("user", "and now?")


def test_a_client_tool_call_is_answered_and_the_model_goes_on(custom_chat, provider):
    turn(
        custom_chat,
        provider,
        "a colour",
        [ToolCall("pick_colour", {"hint": "warm"})],
        [Text("Red it is.")],
    )
    events = list(
        custom_chat.stream(
            "threads.add_client_tool_output", thread_id=custom_chat.thread_id, result={"c": "red"}
        )
    )
    assert [text_of(item) for item in done(events)] == ["Red it is."]
    call = custom_chat.items()[1]
    assert (call["status"], call["output"]) == ("completed", {"c": "red"})
    tools = [text for role, text in provider.requests[-1].messages if role == "tool"]
    assert len(tools) == 2 and "warm" in tools[0] and "red" in tools[1]


def test_retry_answers_the_same_message_again(chat, provider):
    turn(chat, provider, "try", [Text("first")], [Text("second")])
    asked, answered = chat.items()
    events = list(
        chat.stream("threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"])
    )
    assert [text_of(item) for item in done(events)] == ["second"]
    assert [text_of(item) for item in chat.items()] == ["try", "second"]
    assert chat.items()[1]["id"] not in (asked["id"], answered["id"])
    assert provider.requests[-1].messages == [("user", "try")]


def test_a_thread_is_named_after_its_first_message(chat, main):
    first = chat.say("  What is\n\nthe   weather " + "like " * 30)
    titles = [event.thread.title for event in first if event.type == "thread.updated"]
    chat.say("something else")
    title = chat.get("threads.get_by_id", thread_id=chat.thread_id)["title"]
    assert titles == [title]
    assert title == ("What is the weather " + "like " * 30)[: main.TITLE_LENGTH]
    chat.get("threads.update", thread_id=chat.thread_id, title="mine")
    chat.say("and more")
    assert chat.get("threads.get_by_id", thread_id=chat.thread_id)["title"] == "mine"


def test_a_guardrail_takes_back_every_message_of_the_turn(custom_chat, provider):
    custom_chat.say("hello")
    before = custom_chat.items()
    events = turn(
        custom_chat,
        provider,
        "tell me",
        [Text("Let me see. "), ToolCall("clock")],
        [Text("the forbidden word")],
    )
    shown = {event.item.id for event in events if event.type == "thread.item.added"}
    removed = {event.item_id for event in events if event.type == "thread.item.removed"}
    assert len(shown) == 2 and removed == shown
    assert [text_of(item) for item in custom_chat.items()[len(before) :]] == ["tell me"]
    (error,) = [event for event in events if event.type == "error"]
    assert (error.code, error.allow_retry) == ("custom", False) and "rules" in error.message
    assert [text_of(item) for item in done(custom_chat.say("go on"))] == ["You said: go on"]


@pytest.mark.parametrize("provider_name", ["openai"])
def test_ids_do_not_repeat_across_threads(server, provider_name):
    ids = []
    for _ in range(20):
        chat = Chat(server.url)
        chat.say("hi")
        ids += [chat.thread_id, *(item["id"] for item in chat.items())]
    assert len(set(ids)) == len(ids) == 60


def test_ids_have_32_bits(main):
    """chatkit's 32-bit ids collide after about 77,000 threads."""
    store = main.MemoryStore()
    thread = main.ThreadMetadata(id="thr_1", created_at="2026-01-01T00:00:00")
    for id in (store.generate_thread_id({}), store.generate_item_id("message", thread, {})):
        assert re.fullmatch(r"(thr|msg)_[0-9a-f]{32}", id)


@pytest.mark.anyio
async def test_no_message_is_copied_for_each_delta(main, monkeypatch):
    """chatkit keeps a copy of the message for the case that the stream is cancelled.

    That takes 15 µs for each delta.
    """
    copies = []
    monkeypatch.setattr(
        main.AssistantMessageItem, "model_copy", lambda item, **_: copies.append(item) or item
    )
    server = main.ChatKitServerImpl(main.MemoryStore())
    request = {"type": "threads.create", "params": {"input": message("hello")}}
    events = [event async for event in await server.process(json.dumps(request).encode(), {})]
    assert len([event for event in events if b"text_delta" in event]) > 2
    assert len(copies) <= 1  # newer releases of chatkit copy a message when it begins
