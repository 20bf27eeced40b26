"""Turns that meet in one thread, unusual messages, and the log line that each turn leaves."""

import asyncio
import json
import re
import threading
from types import SimpleNamespace

import pytest

from client import Chat, deltas, done, error_of, message, processes, text_of, until
from provider import Failure, Finish, Silence, Text, ToolCall

pytestmark = pytest.mark.anyio
COMPLAINTS = ("never retrieved", "was destroyed", "never awaited", "Traceback", "Unclosed")


class Reading:
    """A stream that is read by a thread of its own; its events, as they come."""

    def __init__(self, stream):
        self.events: list = []
        self.thread = threading.Thread(target=lambda: self.events.extend(stream), daemon=True)
        self.thread.start()

    async def until(self, text: str) -> None:
        """Return when an event that holds the text has come."""
        await until(lambda: any(text in event.model_dump_json() for event in list(self.events)))

    async def end(self) -> list:
        await asyncio.to_thread(self.thread.join, 10)
        assert not self.thread.is_alive()
        return self.events


def again(chat: Chat) -> Chat:
    """The same thread over a connection of its own."""
    return Chat(str(chat.http.base_url), thread_id=chat.thread_id)


# ---- Turns that meet ------------------------------------------------------------


@pytest.mark.parametrize("streamed", ["nothing", "text", "text after a tool"])
async def test_a_thread_is_deleted_while_its_reply_streams(
    custom_chat, customised, provider, streamed
):
    """The stream ends quietly, the provider's connection is closed, and nothing is stored."""
    provider.script["go"] = {
        "nothing": [[Silence()]],
        "text": [[Text("one "), Text("two "), Silence()]],
        "text after a tool": [[Text("one "), ToolCall("clock")], [Text("two "), Silence()]],
    }[streamed]
    start = len(customised.log)
    with customised.no_new(*COMPLAINTS, "ERROR"):
        reading = Reading(custom_chat.start("go"))
        await reading.until("stream_options" if streamed == "nothing" else '"two "')
        await until(
            lambda: len(provider.requests) == len(provider.script["go"]) or streamed != "nothing"
        )
        again(custom_chat).get("threads.delete", thread_id=custom_chat.thread_id)
        for request in provider.requests:
            assert await asyncio.to_thread(request.closed.wait, 1)
        events = await reading.end()
        assert "error" not in [event.type for event in events]
        assert custom_chat.thread_id not in custom_chat.http.get("/debug/threads").json()
        assert custom_chat.http.get("/collect").status_code == 200
    thread = f"thread={custom_chat.thread_id} "
    customised.wait_for(thread)
    (line,) = [line for line in customised.log[start:] if thread in line]
    assert LINE.fullmatch(line)[5] == "stopped"


async def test_other_threads_go_on_when_one_is_deleted(server, provider):
    silence = Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    chats = [Chat(server.url) for _ in range(2)]
    readings = [Reading(chat.start("go")) for chat in chats]
    for reading in readings:
        await reading.until('"one "')
    again(chats[0]).get("threads.delete", thread_id=chats[0].thread_id)
    await readings[0].end()
    silence.end.set()
    assert [text_of(item) for item in done(await readings[1].end())] == ["one two"]
    assert [text_of(item) for item in chats[1].items()] == ["go", "one two"]


async def test_a_thread_is_deleted_between_two_turns_of_one_connection(main):
    """What an application does in the task of a turn goes on.

    It does so when the turn's thread is deleted later.
    """
    server = main.ChatKitServerImpl(main.MemoryStore())
    ended, deleted = asyncio.Event(), asyncio.Event()

    async def connection() -> str:
        request = {"type": "threads.create", "params": {"input": message("hello")}}
        async for event in await server.process(main.json.dumps(request).encode(), {}):
            threads.append(main.json.loads(event[6:]).get("thread", {}).get("id"))
        ended.set()
        await deleted.wait()
        return "went on"

    threads: list = []
    task = asyncio.create_task(connection())
    await ended.wait()
    request = {"type": "threads.delete", "params": {"thread_id": threads[0]}}
    await server.process(main.json.dumps(request).encode(), {})
    deleted.set()
    assert await task == "went on"


@pytest.mark.parametrize("where", ["openai", "sqlite_1"])
async def test_two_messages_at_the_same_moment(servers, provider, where):
    """Both are answered.

    Each model call may see both messages, so it is not known to which of them it replies.
    """
    chat = Chat(servers(where).url)
    chat.say("hello")
    silence = Silence()
    for text in ("one", "two"):
        provider.script[text] = [[Text("a reply, "), silence, Text("whole")]]
    readings = [Reading(again(chat).start(text)) for text in ("one", "two")]
    for reading in readings:
        await reading.until("a reply, ")
    silence.end.set()
    replies = []
    for reading in readings:
        events = await reading.end()
        replies += done(events)
        assert deltas(events, replies[-1].id) == text_of(replies[-1]) == "a reply, whole"
    items = chat.items()[2:]
    assert sorted(text_of(item) for item in items) == [
        "a reply, whole",
        "a reply, whole",
        "one",
        "two",
    ]
    assert len({item["id"] for item in items}) == 4
    assert {reply.id for reply in replies} == {
        item["id"] for item in items if item["type"] == "assistant_message"
    }


async def test_retry_while_the_reply_streams(chat, server, provider):
    provider.script["try"] = [[Text("first "), Silence()], [Text("second")]]
    with server.no_new(*COMPLAINTS):
        reading = Reading(chat.start("try"))
        await reading.until('"first "')
        (asked,) = again(chat).items()
        retried = list(
            again(chat).stream(
                "threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"]
            )
        )
        events = await reading.end()
    assert "error" not in [event.type for event in events]
    assert [text_of(item) for item in done(retried)] == ["second"]
    assert [text_of(item) for item in chat.items()] == ["try", "second"]
    assert [request.messages for request in provider.requests] == [[("user", "try")]] * 2


async def test_stop_and_retry_at_once(server, provider):
    for _ in range(10):
        provider.script["try"] = [[Text("first "), Silence()], [Text("second")]]
        chat = Chat(server.url)
        stream = chat.start("try")
        next(event for event in stream if '"first "' in event.model_dump_json())
        (asked,) = again(chat).items()
        stream.close()
        retried = list(
            again(chat).stream(
                "threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"]
            )
        )
        assert [text_of(item) for item in done(retried)] == ["second"]
        assert [text_of(item) for item in chat.items()] == ["try", "second"]
        assert provider.requests[-1].messages == [("user", "try")]


@pytest.mark.slow
@pytest.mark.parametrize("connection", ["new", "kept alive"])
def test_stop_and_send_at_once(servers, provider, connection):
    """50 times with no pause: the model is told of the stop before it is told the new question.

    Otherwise it would take the new question for what it must not answer.
    """
    server = servers("openai")
    for number in range(50):
        provider.script["go"] = [[Text("one "), Silence()]]
        chat = Chat(server.url)
        stream = chat.start("go")
        next(event for event in stream if '"one "' in event.model_dump_json())
        other = chat if connection == "kept alive" else again(chat)
        if connection == "kept alive":
            assert chat.http.get("/health").status_code == 200
        stream.close()
        assert [text_of(item) for item in done(other.say(f"and {number}"))]
        texts = [text for _, text in provider.requests[-1].messages]
        assert texts[:2] == ["go", "one "]
        assert "cancelled the stream" in texts[2]
        assert texts[3:] == [f"and {number}"]


@pytest.mark.parametrize("database", ["fast", "slow"])
async def test_a_message_that_arrives_before_the_stop(main, provider, database):
    """Whoever stops a reply and sends the next message does both at the same moment.

    The server may hear of the message first. What was streamed may take its time to be stored.
    """

    class Slow(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message" and database == "slow":
                await free.wait()
            await super().add_thread_item(thread_id, item, context)

    async def process(type: str, **params):
        request = {"type": type, "params": params}
        return (await server.process(json.dumps(request).encode(), {})).json_events

    async def answer(thread_id: str) -> list[bytes]:
        params = {"thread_id": thread_id, "input": message("and on")}
        return [event async for event in await process("threads.add_user_message", **params)]

    free = asyncio.Event()
    provider.script["go"] = [[Text("one "), Silence()]]
    server = main.ChatKitServerImpl(Slow())
    server.agent.model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")
    stream = await process("threads.create", input=message("go"))
    thread_id = json.loads((await anext(stream))[6:])["thread"]["id"]
    while b'"one "' not in await anext(stream):
        pass
    next_turn = asyncio.create_task(answer(thread_id))
    await asyncio.sleep(0)
    await stream.aclose()
    await asyncio.wait([next_turn], timeout=0.2 if database == "slow" else 0)
    free.set()
    assert await next_turn
    page = await server.store.load_thread_items(thread_id, None, 10, "asc", {})
    assert [item.type for item in page.data] == [
        "user_message",
        "assistant_message",
        "sdk_hidden_context",
        "user_message",
        "assistant_message",
    ]


# ---- Unusual messages and replies -----------------------------------------------


def test_a_client_tool_call_that_is_never_answered(custom_chat, provider):
    """OpenAI and Anthropic refuse a tool call without its output: neither is sent."""
    provider.script["colour"] = [[Text("Choose. "), ToolCall("pick_colour", {"hint": "warm"})]]
    custom_chat.say("colour")
    assert [text_of(item) for item in done(custom_chat.say("never mind"))] == [
        "You said: never mind"
    ]
    assert provider.requests[-1].messages == [
        ("user", "colour"),
        ("assistant", "Choose. "),
        ("user", "never mind"),
    ]


@pytest.mark.parametrize(
    "text",
    ["\U0001f600 \u202eשלום\u202c e\u0301 \u2028", "NUL \0 in the middle", "long " * 60_000],
    ids=["emoji and right-to-left", "nul", "300 000 characters"],
)
def test_an_unusual_text_is_stored_and_told_unchanged(chat, provider, text):
    provider.script[text] = [[Text(text)]]
    (reply,) = done(chat.say(text))
    assert text_of(reply) == text
    assert [text_of(item) for item in chat.items()] == [text, text]
    chat.say("and on")
    assert provider.requests[-1].messages == [
        ("user", text),
        ("assistant", text),
        ("user", "and on"),
    ]


@pytest.mark.parametrize(("tag", "status"), [("report", 200), (" ", 400)])
def test_a_tag_between_white_space(chat, provider, tag, status):
    content = [
        {"type": "input_text", "text": " \n "},
        {"type": "input_tag", "id": "doc_1", "text": tag, "data": {}},
        {"type": "input_text", "text": "  "},
    ]
    response = chat.post("threads.create", input=message("") | {"content": content})
    assert response.status_code == status
    if status == 200:
        assert provider.requests[-1].messages[0] == ("user", " \n @report  ")
        assert "You said: report" in response.text
    else:
        assert response.json() == {"detail": "The message is empty."} and not provider.requests


async def test_a_reply_that_is_stopped_while_it_is_empty(chat, provider):
    provider.script["go"] = [[Text(""), Silence()]]
    stream = chat.start("go")
    next(event for event in stream if event.type == "stream_options" and provider.asked.wait(5))
    stream.close()
    await until(lambda: again(chat).debug()[-1]["type"] == "SDKHiddenContextItem")
    assert [item["type"] for item in chat.items()] == ["user_message"]
    assert [text_of(item) for item in done(chat.say("and on"))] == ["You said: and on"]
    assert [told for told in provider.requests[-1].messages if "cancelled" not in told[1]] == [
        ("user", "go"),
        ("user", "and on"),
    ]


# ---- The log line of a turn -----------------------------------------------------

LINE = re.compile(
    r"INFO:     turn pid=(\d+) thread=(\S+) provider=(\S+) model=(\S+) end=(\S+)"
    r" first_delta=(?:-|(\d+\.\d{3})s) total=(\d+\.\d{3})s"
    r" input_tokens=(\S+) output_tokens=(\S+)"
)
MODELS = {
    "gemini": "gemini/gemini-flash-latest",
    "openai": "openai/gpt-4o",
    "anthropic": "anthropic/claude-sonnet-4-6",
}
# steps of the provider; how the turn ends; whether a delta comes; input and output tokens
TURNS = {
    "done": ([[Text("Fine.")]], "done", True, "7", "3"),
    "tool": (
        [[Text("Let me look. "), ToolCall("clock")], [Text("It is noon.")]],
        "done",
        True,
        "14",
        "6",
    ),
    "fault": ([[Failure("rate")]], "fault", False, "-", "-"),
    "fault after a tool": (
        [[Text("Let me look. "), ToolCall("clock")], [Failure("rate")]],
        "fault",
        True,
        "7",
        "3",
    ),
    "empty": ([[Finish()]], "fault", False, "7", "3"),
    "stopped": ([[Text("one "), Silence()]], "stopped", True, "-", "-"),
}


@pytest.mark.parametrize("turn", TURNS)
def test_each_turn_is_one_log_line(custom_chat, customised, provider, provider_name, turn):
    steps, end, streamed, tokens_in, tokens_out = TURNS[turn]
    provider.script["a question"] = list(steps)
    start = len(customised.log)
    stream = custom_chat.start("a question")
    for event in stream:
        if turn == "stopped" and '"one "' in event.model_dump_json():
            stream.close()
            break
    customised.wait_for(f"thread={custom_chat.thread_id} ", seconds=10)
    thread = f"thread={custom_chat.thread_id}"
    (line,) = [line for line in customised.log[start:] if thread in line]
    found = LINE.fullmatch(line).groups()
    pid, thread, provider_is, model, ended, first_delta, total, *tokens = found
    assert int(pid) in processes(customised)
    assert (thread, provider_is, model) == (
        custom_chat.thread_id,
        provider_name,
        MODELS[provider_name],
    )
    assert (ended, tokens) == (end, [tokens_in, tokens_out])
    assert (first_delta is not None) == streamed
    assert 0 <= float(first_delta or 0) <= float(total) < 60
    assert "question" not in line and "key" not in line


def test_the_first_delta_is_the_first(main, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(main, "time", SimpleNamespace(monotonic=lambda: clock.now))
    turn = main.Turn(set(), "thr_1")
    for seconds, type in (
        (1.0, "thread.item.added"),
        (2.0, "thread.item.updated"),
        (3.0, "thread.item.updated"),
    ):
        clock.now = seconds
        turn.put(f'data: {{"type":"{type}"}}\n\n'.encode())
    assert turn.first_delta == 2.0


# What the user does; how the turn ends; what the log says of the cause.
ENDS = {
    "an action": ("show", "done", None),
    "an action that refuses": ("refuse", "fault", "ERROR:    You cannot do this now."),
    "an action with a bug": ("break", "fault", "ZeroDivisionError: a bug in an action"),
    "a history that is not read": (
        "no history",
        "fault",
        "OSError: the history was not read",
    ),
    "a title that is not saved": ("no title", "fault", "OSError: the title was not saved"),
    "a message that is not stored": (
        "more than the disk holds",
        "fault",
        "OSError: the disk is full",
    ),
    "a reply that is not stored": ("a long reply", "fault", "OSError: the disk is full"),
    "a bug in a tool": ("use the broken tool", "fault", "ZeroDivisionError: a bug in a tool"),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_turn_is_one_log_line_and_a_fault_has_its_cause(servers, provider, name):
    text, end, cause = ENDS[name]
    server = servers("customised_openai")
    provider.script["a long reply"] = [[Text("more than the disk holds")]]
    provider.script["use the broken tool"] = [[ToolCall("broken")]]
    chat = Chat(server.url)
    if "action" in name:
        chat.say("hello")
        server.wait_for(f"thread={chat.thread_id} ")
    start = len(server.log)
    if "action" in name:
        action = {"type": text, "payload": {}}
        events = list(chat.stream("threads.custom_action", thread_id=chat.thread_id, action=action))
    else:
        events = chat.say(text)
    assert [event.type for event in events].count("error") == (1 if end == "fault" else 0)
    server.wait_for(f"thread={chat.thread_id} ", times=2 if "action" in name else 1)
    log = server.log[start:]
    (line,) = [line for line in log if f"thread={chat.thread_id} " in line]
    thread, provider_is, model, ended = LINE.fullmatch(line).groups()[1:5]
    assert (thread, provider_is, model) == (chat.thread_id, "openai", MODELS["openai"])
    assert ended == end
    before = log[: log.index(line)]
    if cause:
        assert before.count(cause) == 1
    else:
        assert not [line for line in before if "ERROR" in line]


def test_the_log_line_and_the_cause_of_a_missing_key(servers):
    server = servers("no_key")
    chat = Chat(server.url)
    start = len(server.log)
    error = error_of(chat.say("hello"))
    server.wait_for(f"thread={chat.thread_id} ")
    log = server.log[start:]
    (line,) = [line for line in log if f"thread={chat.thread_id} " in line]
    assert LINE.fullmatch(line).groups()[1:5] == (
        chat.thread_id,
        "gemini",
        MODELS["gemini"],
        "fault",
    )
    assert log.count(f"ERROR:    {error.message}") == 1
