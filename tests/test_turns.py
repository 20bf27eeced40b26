"""Turns that overlap or are abandoned in one thread, and messages that are unusual."""

import asyncio
import gc
import json
import threading
import warnings

import pytest
from client import Chat, deltas, done, error_of, message, text_of, until
from provider import Silence, Text, ToolCall

pytestmark = pytest.mark.anyio
COMPLAINTS = ("never retrieved", "was destroyed", "never awaited", "Traceback", "Unclosed")


def in_background(stream) -> tuple[threading.Thread, list]:
    """Read a stream in a thread of its own; its events, as they come."""
    events: list = []
    thread = threading.Thread(target=lambda: [events.append(event) for event in stream], daemon=True)
    thread.start()
    return thread, events


@pytest.mark.parametrize("shown", ["nothing", "text", "a tool's text"])
async def test_a_thread_is_deleted_while_its_reply_streams(custom_chat, customised, provider, shown):
    """The stream ends with a readable error at most, the provider's connection is closed, and nothing is stored."""
    silence = Silence()
    first = [Text("Let me look. "), ToolCall("clock")]
    provider.script["go"] = {
        "nothing": [[silence]],
        "text": [[Text("one "), Text("two "), silence, Text("three")]],
        "a tool's text": [first, [Text("two "), silence]],
    }[shown]
    with customised.no_new(*COMPLAINTS):
        stream = custom_chat.start("go")
        thread, events = in_background(stream)
        mark = {"nothing": "stream_options", "text": '"two "', "a tool's text": '"two "'}[shown]
        await until(lambda: any(mark in event.model_dump_json() for event in list(events)))
        await until(lambda: provider.requests)
        assert Chat(customised.url, thread_id=custom_chat.thread_id).get("threads.delete", thread_id=custom_chat.thread_id) == {}
        assert all(await asyncio.to_thread(request.closed.wait, 1) for request in provider.requests)
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()
        errors = [event for event in events if event.type == "error"]
        assert len(errors) <= 1 and all(error.message and not error.allow_retry for error in errors)
        assert custom_chat.thread_id not in custom_chat.http.get("/debug/threads").json()
        await asyncio.to_thread(custom_chat.http.get, "/collect")
    silence.end.set()


async def test_a_thread_is_deleted_as_its_reply_ends(custom_chat, customised, provider):
    silence = Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    with customised.no_new(*COMPLAINTS):
        thread, events = in_background(custom_chat.start("go"))
        await until(lambda: any('"one "' in event.model_dump_json() for event in list(events)))
        silence.end.set()
        custom_chat2 = Chat(customised.url, thread_id=custom_chat.thread_id)
        custom_chat2.get("threads.delete", thread_id=custom_chat.thread_id)
        await asyncio.to_thread(thread.join, 5)
        assert custom_chat.thread_id not in custom_chat.http.get("/debug/threads").json()


def test_500_equal_chunks(chat, provider):
    provider.script["rule"] = [[Text("---")] * 500]
    events = chat.say("rule")
    assert [text_of(item) for item in done(events)] == ["---" * 500]
    assert "error" not in [event.type for event in events]


async def test_leaving_at_any_step(main, provider, monkeypatch):
    for steps in range(0, 120):
        server = main.ChatKitServerImpl(main.MemoryStore())
        server.agent.model = main.ProviderModel(model="openai/gpt-4o", base_url=f"{provider.url}/openai", api_key="key")
        request = {"type": "threads.create", "params": {"input": message("go")}}
        async def read():
            async for _ in await server.process(json.dumps(request).encode(), {}):
                pass
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            task = asyncio.create_task(read())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await asyncio.sleep(0.001)
            gc.collect()
            await asyncio.sleep(0)
        complaints = [str(w.message) for w in seen if "never awaited" in str(w.message)]
        if complaints: print(steps, complaints)


@pytest.mark.parametrize("where", ["openai", "sqlite_1"])
async def test_two_messages_at_the_same_moment(servers, provider, where):
    url = servers(where).url
    chat = Chat(url)
    chat.say("hello")
    silence = Silence()
    provider.script["one"] = [[Text("first "), silence, Text("reply")]]
    provider.script["two"] = [[Text("second "), silence, Text("reply")]]
    running = [in_background(Chat(url, thread_id=chat.thread_id).start(text)) for text in ("one", "two")]
    await until(lambda: all("delta" in str([event.model_dump_json() for event in list(events)]) for _, events in running))
    silence.end.set()
    for thread, _ in running:
        await asyncio.to_thread(thread.join, 5)
    assert [text_of(done(events)[0]) for _, events in running] == ["first reply", "second reply"]
    items = chat.items()[2:]
    assert sorted(text_of(item) for item in items) == ["first reply", "one", "second reply", "two"]
    assert len({item["id"] for item in items}) == 4


async def test_retry_while_the_reply_streams(chat, server, provider):
    silence = Silence()
    provider.script["try"] = [[Text("first "), silence, Text("reply")], [Text("second")]]
    thread, events = in_background(chat.start("try"))
    await until(lambda: any('"first "' in event.model_dump_json() for event in list(events)))
    other = Chat(server.url, thread_id=chat.thread_id)
    (asked,) = other.items()
    retried = list(other.stream("threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"]))
    silence.end.set()
    await asyncio.to_thread(thread.join, 5)
    print([e.model_dump_json() for e in events[-3:]])
    assert [text_of(item) for item in done(retried)] == ["second"]
    assert [text_of(item) for item in other.items()] == ["try", "second"]
    assert provider.requests[-1].messages == [("user", "try")]


async def test_stop_then_retry_at_once(chat, server, provider):
    for number in range(10):
        provider.script["try"] = [[Text("first "), Silence()], [Text("second")]]
        chat = Chat(server.url)
        stream = chat.start("try")
        next(event for event in stream if '"first "' in event.model_dump_json())
        other = Chat(server.url, thread_id=chat.thread_id)
        (asked,) = other.items()
        stream.close()
        retried = list(other.stream("threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"]))
        assert [text_of(item) for item in done(retried)] == ["second"]
        assert [text_of(item) for item in other.items()] == ["try", "second"]
        assert [m for m in provider.requests[-1].messages if m[0] == "user"] == [("user", "try")]


def test_a_client_tool_call_that_is_never_answered(custom_chat, provider):
    provider.script["colour"] = [[Text("Choose. "), ToolCall("pick_colour", {"hint": "warm"})]]
    custom_chat.say("colour")
    assert [text_of(item) for item in done(custom_chat.say("never mind"))] == ["You said: never mind"]
    print(provider.requests[-1].messages)
    told = provider.requests[-1].messages
    assert not [text for role, text in told if role == "tool"]


def test_unusual(chat, provider):
    for text in ["\U0001f600 \u202eשלום\u202c e\u0301", "NUL \0 end", "x" * 300_000]:
        r = chat.say(text)
        print([text_of(i)[:40] for i in done(r)], text_of(chat.items()[-2]) == text, provider.requests[-1].messages[-1][1] == text)


def test_white_space_and_tag(chat, provider):
    tag = {"type": "input_tag", "id": "doc_1", "text": "report", "data": {}}
    for t in [tag, {**tag, "text": " "}]:
        content = [{"type": "input_text", "text": " \n "}, t, {"type": "input_text", "text": "  "}]
        r = chat.post("threads.create", input=message("") | {"content": content})
        print(r.status_code, r.text[-300:])
        print(provider.requests[-1].messages if provider.requests else None)


async def test_empty_after_stop(chat, server, provider):
    provider.script["go"] = [[Text(""), Silence()]]
    stream = chat.start("go")
    next(event for event in stream if event.type == "thread.item.added" or event.type == "stream_options" and provider.asked.wait(5))
    stream.close()
    await until(lambda: Chat(server.url, thread_id=chat.thread_id).debug()[-1]["type"] == "SDKHiddenContextItem")
    r = Chat(server.url, thread_id=chat.thread_id).say("and on")
    print([text_of(i) for i in done(r)], provider.requests[-1].messages)
