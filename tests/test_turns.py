"""Turns that meet in one thread, and the log line that each turn leaves."""

import asyncio
import re

import pytest
from chatkit.store import NotFoundError
from fastapi import HTTPException

from client import Chat, Local, Reading, again, done, leave, message, processes, text_of, until
from conftest import COMPLAINTS, MODELS
from provider import Failure, Finish, Pause, Silence, Text, ToolCall
from test_memory import RED, TOOLS

one_provider = pytest.mark.parametrize("provider_name", ["openai"])


@one_provider
@pytest.mark.parametrize("streamed", ["nothing", "text", "text after a tool"])
async def test_a_thread_is_deleted_while_its_reply_streams(
    custom_chat, customised, provider, streamed
):
    """The provider's connection is closed, and nothing is stored. Other threads go on."""
    chat, other, silence = custom_chat, Chat(customised.url), Silence()
    provider.script["other"] = [[Text("one "), silence, Text("two")]]
    steps = provider.script["go"] = {
        "nothing": [[Silence()]],
        "text": [[Text("one "), Text("two "), Silence()]],
        "text after a tool": [[Text("one "), ToolCall("clock")], [Text("two "), Silence()]],
    }[streamed]
    count = 1 + len(steps)
    with customised.no_new(*COMPLAINTS):
        beside = Reading(other.start("other"))
        await beside.until('"one "')
        reading = Reading(chat.start("go"))
        await reading.until("stream_options" if streamed == "nothing" else '"two "')
        await until(lambda: len(provider.requests) == count)
        again(chat).get("threads.delete", thread_id=chat.thread_id)
        for request in provider.requests[1:]:
            assert await asyncio.to_thread(request.closed.wait, 5)
        assert "error" not in [event.type for event in await reading.end()]
        assert chat.thread_id not in chat.http.get("/debug/threads").json()
        silence.end.set()
        assert [text_of(item) for item in done(await beside.end())] == ["one two"]
        assert chat.http.get("/collect").status_code == 200
    log = customised.wait_for(f"thread={chat.thread_id} ")
    assert re.findall(rf"thread={chat.thread_id} .* end=(\w+)", log) == ["stopped"]


@one_provider
async def test_a_retry_while_the_reply_streams(customised, provider):
    """The first turn ends before the second begins."""
    provider.script["try"] = [[Text("first "), Silence()], [Text("second")]]
    chat = Chat(customised.url)
    with customised.no_new(*COMPLAINTS):
        reading = Reading(chat.start("try"))
        await reading.until('"first "')
        other = again(chat)
        retry = {"thread_id": chat.thread_id, "item_id": other.items()[0]["id"]}
        events = list(other.stream("threads.retry_after_item", **retry))
        assert [text_of(item) for item in done(events)] == ["second"]
        assert "error" not in [event.type for event in await reading.end()]
    assert [text_of(item) for item in chat.items()] == ["try", "second"]
    assert [request.messages for request in provider.requests] == [[("user", "try")]] * 2


@pytest.mark.parametrize("database", ["fast", "slow"])
async def test_a_message_that_arrives_before_the_stop(main, provider, database):
    """The server may hear of the message first, and what was streamed may be stored slowly."""

    class Slow(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message":
                await free.wait()
            await super().add_thread_item(thread_id, item, context)

    free = asyncio.Event()
    if database == "fast":
        free.set()
    provider.script["go"] = [[Text("one "), Silence()]]
    local = Local(main, provider, Slow())
    turn = await local.start("go")
    while b'"one "' not in await anext(turn):
        pass
    next_turn = asyncio.create_task(local.say("and on"))
    await asyncio.sleep(0)
    await turn.aclose()
    await asyncio.wait([next_turn], timeout=0.2 if database == "slow" else 0)
    free.set()
    assert done(await next_turn)
    kinds = ["user_message", "assistant_message"]
    assert [item.type for item in await local.items()] == [*kinds, "sdk_hidden_context", *kinds]


async def test_two_retries_at_once(main):
    """The second one stops the first, which it must know from its beginning: one answer is left."""
    local = Local(main)
    await local.say("hello")
    retry = {**local.thread, "item_id": (await local.items())[0].id}
    retries = [local.process("threads.retry_after_item", **retry) for _ in range(2)]
    await asyncio.wait([result.json_events.task for result in await asyncio.gather(*retries)])
    assert [item.type for item in await local.items()] == ["user_message", "assistant_message"]


async def test_new_threads_do_not_wait_for_each_other(main, provider, monkeypatch):
    """A turn that has made no thread yet is no turn of the same thread."""
    monkeypatch.setattr(main, "LATE_STOP_SECONDS", 60)
    provider.script["go"] = [[Silence()]]
    local = Local(main, provider)
    both = [local.process("threads.create", input=message("go")) for _ in range(2)]
    await asyncio.wait_for(asyncio.gather(*both), 10)
    await local.server.stop_all_turns()


@one_provider
async def test_a_thread_is_renamed_while_its_reply_streams(custom_chat, provider):
    """The turn saves the thread after it, with the status that a tool has changed."""
    chat, silence = custom_chat, Silence()
    lock = ToolCall("end_thread", {"how": "locked"})
    provider.script["go"] = [[Text("one "), silence, lock], [Text("two")]]
    reading = Reading(chat.start("go"))
    await reading.until('"one "')
    again(chat).get("threads.update", thread_id=chat.thread_id, title="mine")
    silence.end.set()
    await reading.end()
    thread = chat.thread()
    assert (thread["title"], thread["status"]["type"]) == ("mine", "locked")


async def test_the_first_event_decides(main):
    """What has changed since a request was checked is refused like what was never there."""

    class Changing(main.MemoryStore):
        async def load_thread(self, thread_id, context):
            loads.append(thread_id)
            if len(loads) == 2:  # the first is the check
                await self.delete_thread(thread_id, context)
            return await super().load_thread(thread_id, context)

    loads = ["the first message"] * 2
    local = Local(main, store=Changing())
    assert done(await local.say("hello"))
    loads.clear()
    with pytest.raises(NotFoundError):
        await local.start("and on")
    assert not local.server.turns and not await local.items()


async def test_more_than_one_answer_to_a_client_tool_call(main, provider):
    """Two at the same moment, and one after the turn."""
    provider.script["go"] = [[RED], [Text("Red it is.")]]
    local = Local(main, provider, **TOOLS)
    await local.say("go")
    answers = await asyncio.gather(*map(local.answer, ("red", "blue")), return_exceptions=True)
    (refused,) = [answer for answer in answers if isinstance(answer, Exception)]
    assert isinstance(refused, HTTPException) and refused.status_code == 400
    before = await local.items()
    with pytest.raises(HTTPException, match="No client tool call is pending"):
        await local.answer("green")
    assert await local.items() == before


LINE = re.compile(
    r"INFO:     turn pid=(\d+) thread=(\S+) provider=(\S+) model=(\S+) end=(\S+)"
    r" first_delta=(?:-|(\d+\.\d{3})s) total=(\d+\.\d{3})s"
    r" input_tokens=(\S+) output_tokens=(\S+)"
)
LOOK = [Text("Let me look. "), ToolCall("clock")]
# steps of the provider; how the turn ends; whether a delta comes; input and output tokens
TURNS = {
    "done": ([[Text("Fine. "), Pause(0.2), Text("Yes.")]], "done", True, "7", "3"),
    "tool": ([LOOK, [Text("It is noon.")]], "done", True, "14", "6"),
    # Claude and Gemini may say nothing more. What came before is the reply.
    "silent after a tool": ([LOOK, [Finish()]], "done", True, "14", "6"),
    "error": ([[Failure("rate")]], "error", False, "-", "-"),
    "error after a tool": ([LOOK, [Failure("rate")]], "error", True, "7", "3"),
    "empty": ([[Finish()]], "error", False, "7", "3"),
    "stopped": ([[Text("one "), Silence()]], "stopped", True, "-", "-"),
}


def line_of(server, chat: Chat, start: int, times: int = 1) -> tuple[list[str], tuple]:
    """The log up to the turn's only line since then, and the line's fields."""
    server.wait_for(f"thread={chat.thread_id} ", times)
    log = server.log[start:]
    (line,) = [line for line in log if f"thread={chat.thread_id} " in line]
    return log[: log.index(line)], LINE.fullmatch(line).groups()


def test_each_turn_is_one_log_line(customised, provider, provider_name):
    model = f"{provider_name}/{MODELS[provider_name]}"
    first_line = len(customised.log)
    for name, (steps, end, streamed, *tokens) in TURNS.items():
        chat, start = Chat(customised.url), len(customised.log)
        provider.script[f"question {name}"] = list(steps)
        leave(chat.start(f"question {name}"), '"one "' if name == "stopped" else "nothing")
        _, (pid, *facts) = line_of(customised, chat, start)
        assert int(pid) in processes(customised)
        first, total = facts[4:6]
        assert [name, *facts[:4]] == [name, chat.thread_id, provider_name, model, end]
        assert facts[6:] == tokens
        assert (first is not None) == streamed
        # Not even the last delta of "done" came first.
        assert 0 <= float(first or 0) <= float(total) - 0.1 * (name == "done") < 60
    log = "\n".join(customised.log[first_line:])
    assert "question" not in log and "-key-" not in log


FULL = "OSError: the disk is full"
# What the user does; how the turn ends; what the log says of the cause.
CAUSES = {
    "an action": ("show", "done", ""),
    "an action that refuses": ("refuse", "error", ""),
    "an action with a bug": ("break", "error", "ZeroDivisionError: a bug in an action"),
    "a title that is not saved": ("no title", "error", "OSError: the title was not saved"),
    "a message that is not stored": ("more than the disk holds", "error", FULL),
    "a reply that is not stored": ("a long reply", "error", FULL),
    "a timeout in a tool": ("use the database", "error", "TimeoutError: the database was silent"),
}


@one_provider
@pytest.mark.parametrize("name", CAUSES)
def test_an_error_is_logged_once_with_its_cause(custom_chat, customised, provider, name):
    text, end, cause = CAUSES[name]
    chat, is_action = custom_chat, "action" in name
    provider.script["a long reply"] = [[Text("more than the disk holds")]]
    provider.script["use the database"] = [[ToolCall("broken")]]
    if is_action:
        chat.say("hello")
        customised.wait_for(f"thread={chat.thread_id} ")
    start = len(customised.log)
    if is_action:
        action = {"type": text, "payload": {}}
        events = list(chat.stream("threads.custom_action", thread_id=chat.thread_id, action=action))
    else:
        events = chat.say(text)
    retries = [event.allow_retry for event in events if event.type == "error"]
    assert retries == [text != "refuse"] * (end == "error")
    before, fields = line_of(customised, chat, start, 1 + is_action)
    assert fields[4] == end
    assert before.count(cause) == 1 if cause else "ERROR" not in "\n".join(before)
