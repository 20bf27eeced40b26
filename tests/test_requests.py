"""Invalid requests: a 4xx with a reason, nothing stored, nothing in the log but the access line."""

import json
import random
import socket
import time
from datetime import datetime
from types import MethodType, SimpleNamespace
from typing import ClassVar

import httpx
import pytest
from chatkit.store import AttachmentStore
from chatkit.types import CustomTask, FileAttachment, TaskItem, WidgetItem
from chatkit.widgets import Card

from client import NO_TLS, Chat, done, memory, message, text_of
from provider import Failure, ToolCall

NOW = datetime(2026, 1, 1)
NO_TRACE = ("Traceback", "Exception", "ERROR")


@pytest.fixture(scope="module")
def server(servers):
    """One provider will do: these requests never reach it."""
    return servers("openai")


@pytest.fixture(scope="module")
def customised(servers):
    return servers("customised_openai")


def refused(server, status: int, says: str, **request) -> None:
    """The request gets this status, a reason that holds `says`, and changes nothing."""
    before = httpx.get(f"{server.url}/debug/threads", verify=NO_TLS).json()
    with server.no_new(*NO_TRACE):
        response = httpx.post(f"{server.url}/chatkit", verify=NO_TLS, timeout=30, **request)
        assert response.status_code == status, response.text
        assert set(response.json()) == {"detail"}
        assert says in response.json()["detail"], response.text
        assert len(response.text) < 500
        after = httpx.get(f"{server.url}/debug/threads", verify=NO_TLS).json()
    assert after == before


DEEP = b'{"type": "threads.list", "params": {"after": ' + b"[" * 2_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Invalid JSON"),
        (b"hello", "Invalid JSON"),
        (b'{"type": "threads.list"', "Invalid JSON"),
        (b'{"type": "threads.list", "params": {"after": "\xff\xfe"}}', "Invalid JSON"),
        (b'{"type": "threads.list", "params": {"after": "\\ud800"}}', "Invalid JSON"),
        (DEEP, "Invalid JSON"),
        (b"[]", "should be an object"),
        (b"null", "should be an object"),
        (b"{}", "type"),
        (b'{"type": "threads.fly", "params": {}}', "threads.fly"),
        (b'{"type": "' + b"x" * 1000 + b'", "params": {}}', "xxxxx"),
        (b'{"type": "threads.list"}', "params: Field required"),
        (b'{"type": "threads.create", "params": {}}', "input: Field required"),
        (b'{"type": "threads.create", "params": {"input": {"content": "hi"}}}', "valid array"),
        (b'{"type": "threads.list", "params": {"limit": "many"}}', "limit"),
        (b'{"type": "threads.list", "params": {"limit": -1}}', "limit must be at least 1"),
        (
            b'{"type": "items.list", "params": {"thread_id": "thr_x", "limit": -1}}',
            "limit must be at least 1",
        ),
        (b'{"type": "threads.list", "params": {"order": "random"}}', "order"),
        (
            json.dumps({"type": "threads.create", "params": {"input": message(" ")}}).encode(),
            "empty",
        ),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_not_a_request(server, body, says):
    refused(server, 400, says, content=body)


@pytest.mark.parametrize(
    ("type", "params"),
    [
        ("threads.get_by_id", {"thread_id": "thr_x"}),
        ("threads.update", {"thread_id": "thr_x", "title": "t"}),
        ("threads.delete", {"thread_id": "thr_x"}),
        ("threads.list", {"after": "thr_x"}),
        ("items.list", {"thread_id": "thr_x"}),
        ("items.list", {"thread_id": "THREAD", "after": "msg_x"}),
        ("items.feedback", {"thread_id": "thr_x", "item_ids": [], "kind": "positive"}),
        ("items.feedback", {"thread_id": "THREAD", "item_ids": ["msg_x"], "kind": "positive"}),
        ("threads.add_user_message", {"thread_id": "thr_x", "input": message("hi")}),
        (
            "threads.add_user_message",
            {"thread_id": "THREAD", "input": message("hi", attachments=["atc_x"])},
        ),
        ("threads.create", {"input": message("hi", attachments=["atc_x"])}),
        ("threads.add_client_tool_output", {"thread_id": "thr_x", "result": 1}),
        ("threads.retry_after_item", {"thread_id": "thr_x", "item_id": "msg_x"}),
        ("threads.retry_after_item", {"thread_id": "THREAD", "item_id": "msg_x"}),
    ],
)
def test_nothing_by_that_id(server, type, params):
    chat = Chat(server.url)
    chat.say("hello")
    params = {
        name: chat.thread_id if value == "THREAD" else value for name, value in params.items()
    }
    missing = next(value for value in ("thr_x", "msg_x", "atc_x") if value in json.dumps(params))
    refused(server, 404, f"{missing} not found", json={"type": type, "params": params})


@pytest.mark.parametrize(
    ("type", "params", "says"),
    [
        (
            "attachments.create",
            {"name": "a", "size": 1, "mime_type": "text/plain"},
            "Attachments are not configured",
        ),
        ("attachments.delete", {"attachment_id": "atc_x"}, "Attachments are not configured"),
        (
            "threads.add_client_tool_output",
            {"thread_id": "THREAD", "result": 1},
            "No client tool call is pending",
        ),
        (
            "threads.custom_action",
            {"thread_id": "THREAD", "action": {"type": "a", "payload": 1}},
            "not supported",
        ),
        (
            "threads.retry_after_item",
            {"thread_id": "THREAD", "item_id": "REPLY"},
            "not a user_message",
        ),
        # chatkit 1.5 and 1.6 know these, 1.4 does not.
        (
            "input.transcribe",
            {"audio_base64": "AAAA", "mime_type": "audio/webm"},
            "input.transcribe",
        ),
        (
            "threads.sync_custom_action",
            {"thread_id": "THREAD", "action": {"type": "a"}},
            "threads.sync_custom_action",
        ),
        (
            "threads.add_structured_input",
            {"thread_id": "THREAD", "item_id": "REPLY", "input": {}},
            "structured_input",
        ),
    ],
)
def test_not_possible_here(server, type, params, says):
    chat = Chat(server.url)
    reply = done(chat.say("hello"))[0].id
    names = {"THREAD": chat.thread_id, "REPLY": reply}
    params = {name: names.get(str(value), value) for name, value in params.items()}
    refused(server, 400, says, json={"type": type, "params": params})


CUSTOM_ACTION = {
    "type": "threads.custom_action",
    "params": {"thread_id": "thr_1", "action": {"type": "a", "payload": {}}},
}


def with_action(main, where: str):
    """A server whose `action` is written in this place."""

    async def action(self, thread, action, sender, context):
        yield main.ProgressUpdateEvent(text="acted")

    plain = main.ChatKitServerImpl
    base = type("Base", (plain,), {"action": action})
    mixin = type("Mixin", (), {"action": action})
    kind = {
        "the class": base,
        "a base class": type("Derived", (base,), {}),
        "a mixin": type("Mixed", (mixin, plain), {}),
        "the object": plain,
    }[where]
    server = kind(main.MemoryStore())
    if where == "the object":
        server.action = MethodType(action, server)
    return server


@pytest.mark.anyio
@pytest.mark.parametrize("where", ["the class", "a base class", "a mixin", "the object"])
async def test_an_action_may_be_written_anywhere(main, where):
    server = with_action(main, where)
    await server.store.save_thread(main.ThreadMetadata(id="thr_1", created_at=NOW), {})
    events = [event async for event in await server.process(json.dumps(CUSTOM_ACTION), {})]
    assert b'"text":"acted"' in events[1]


@pytest.mark.anyio
async def test_an_action_that_is_written_nowhere(main):
    with pytest.raises(main.HTTPException) as refusal:
        await main.ChatKitServerImpl(main.MemoryStore()).process(json.dumps(CUSTOM_ACTION), {})
    assert refusal.value.status_code == 400
    assert refusal.value.detail == "threads.custom_action is not supported."


@pytest.mark.anyio
async def test_an_action_on_an_item(main):
    """It is about a widget, or about nothing."""
    server = with_action(main, "the class")
    await server.store.save_thread(main.ThreadMetadata(id="thr_1", created_at=NOW), {})
    base = {"thread_id": "thr_1", "created_at": NOW}
    for item in (
        WidgetItem(id="wig_1", widget=Card(children=[]), **base),
        TaskItem(id="tsk_1", task=CustomTask(title="t"), **base),
    ):
        await server.store.add_thread_item("thr_1", item, {})

    async def act(item_id: str):
        params = {**CUSTOM_ACTION["params"], "item_id": item_id}
        return await server.process(json.dumps({**CUSTOM_ACTION, "params": params}), {})

    assert [event async for event in await act("wig_1")]
    with pytest.raises(main.HTTPException, match="Item tsk_1 is not a widget"):
        await act("tsk_1")
    with pytest.raises(main.NotFoundError, match="Item msg_x not found"):
        await act("msg_x")


class Attachments(AttachmentStore):
    """What an application writes for its files; it remembers which were deleted."""

    def __init__(self):
        self.deleted: list[str] = []

    async def delete_attachment(self, attachment_id, context):
        self.deleted.append(attachment_id)


@pytest.mark.anyio
async def test_an_attachment_of_another_user(main):
    """It cannot be deleted, or be added to a message."""
    alice, bob = {"user_id": "alice"}, {"user_id": "bob"}
    files = Attachments()
    server = main.ChatKitServerImpl(main.MemoryStore(), files)
    attachment = FileAttachment(id="atc_1", name="a.txt", mime_type="text/plain")
    await server.store.save_attachment(attachment, alice)
    delete = json.dumps({"type": "attachments.delete", "params": {"attachment_id": "atc_1"}})
    send = json.dumps(
        {"type": "threads.create", "params": {"input": message("hi", attachments=["atc_1"])}}
    )
    for request in (delete, send):
        with pytest.raises(main.NotFoundError, match="Attachment atc_1 not found"):
            await server.process(request, bob)
    assert files.deleted == []
    assert await server.store.load_attachment("atc_1", alice) == attachment

    # This store takes uploads elsewhere: ChatKit's own two phases are not possible.
    create = {"name": "a.txt", "size": 1, "mime_type": "text/plain"}
    with pytest.raises(main.HTTPException) as refusal:
        await server.process(json.dumps({"type": "attachments.create", "params": create}), alice)
    assert refusal.value.status_code == 400
    assert refusal.value.detail == "attachments.create is not supported."

    # Without a text, too.
    alone = {"input": message("", attachments=["atc_1"])}
    assert await server.process(json.dumps({"type": "threads.create", "params": alone}), alice)

    await server.process(delete, alice)
    assert files.deleted == ["atc_1"]
    with pytest.raises(main.NotFoundError):
        await server.store.load_attachment("atc_1", alice)


@pytest.mark.anyio
async def test_requests_of_newer_releases_of_chatkit(main):
    """chatkit 1.4 does not know them, so the requests are made here."""

    class Newer(main.MemoryStore):
        """A Store whose thread has these items."""

        items: ClassVar = {
            "sti_1": SimpleNamespace(type="structured_input", status="pending"),
            "sti_2": SimpleNamespace(type="structured_input", status="completed"),
            "wig_1": SimpleNamespace(type="widget"),
        }

        async def load_item(self, thread_id, item_id, context):
            return self.items[item_id]

    server = main.ChatKitServerImpl(Newer())
    await server.store.save_thread(main.ThreadMetadata(id="thr_1", created_at=NOW), {})

    async def refusal(type: str, item_id: str = "", thread_id: str = "thr_1") -> str:
        params = SimpleNamespace(thread_id=thread_id, item_id=item_id)
        try:
            await server.check(SimpleNamespace(type=type, params=params), {})
        except main.HTTPException as error:
            return f"{error.status_code} {error.detail}"
        return ""

    structured = "threads.add_structured_input"
    assert await refusal(structured, "sti_1") == ""
    assert await refusal(structured, "sti_2") == "400 Item sti_2 is not pending."
    assert await refusal(structured, "wig_1") == "400 Item wig_1 is not a structured_input."
    with pytest.raises(main.NotFoundError, match="Thread thr_2 not found"):
        await refusal(structured, "sti_1", "thr_2")

    for type, method in (("threads.sync_custom_action", "sync_action"), ("input.transcribe", None)):
        assert await refusal(type, "wig_1") == f"400 {type} is not supported."
        setattr(server, method or "transcribe", lambda *_: None)
        assert await refusal(type, "wig_1") == ""
    assert await refusal("threads.sync_custom_action", "sti_1") == "400 Item sti_1 is not a widget."


def test_a_second_output_for_a_client_tool_call(customised, provider):
    chat = Chat(customised.url)
    provider.script["colour"] = [[ToolCall("pick_colour", {"hint": "warm"})], []]
    chat.say("colour")
    list(chat.stream("threads.add_client_tool_output", thread_id=chat.thread_id, result="red"))
    again = {
        "type": "threads.add_client_tool_output",
        "params": {"thread_id": chat.thread_id, "result": "blue"},
    }
    refused(customised, 400, "No client tool call is pending", json=again)
    assert chat.items()[1]["output"] == "red"


def test_too_long(server, main):
    text = "x" * main.MAX_BODY_BYTES
    body = json.dumps({"type": "threads.create", "params": {"input": message(text)}}).encode()
    says = f"longer than {main.MAX_BODY_BYTES} bytes"
    refused(server, 413, says, content=body)
    chunks = (body[at : at + 65536] for at in range(0, len(body), 65536))
    refused(server, 413, says, content=chunks)


def test_a_body_that_is_too_long_is_not_held_in_memory(server):
    before = memory(server)
    chunks = (b" " * 65536 for _ in range(2048))  # 128 MiB
    assert (
        httpx.post(f"{server.url}/chatkit", verify=NO_TLS, content=chunks, timeout=60).status_code
        == 413
    )
    assert memory(server) - before < 32 * 1024


def test_a_client_that_leaves_in_the_middle_of_its_request(server):
    with server.no_new("Traceback"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /chatkit HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        Chat(server.url).say("hello")


def test_paging_always_ends(server, provider):
    chat = Chat(server.url)
    for number in range(6):
        provider.script[f"message {number}"] = [[Failure("rate")]]
        chat.say(f"message {number}")
    for limit in (0, 1, 2, 1000, 10**30):
        seen, after = [], None
        while True:
            page = chat.get(
                "items.list", thread_id=chat.thread_id, limit=limit, order="asc", after=after
            )
            seen += [item["id"] for item in page["data"]]
            after = page.get("after")
            if not page["has_more"]:
                break
            assert after == page["data"][-1]["id"]
        assert seen == [item["id"] for item in chat.items()] and len(seen) == 6


def test_a_long_message_is_fine(server):
    text = "x" * 1_000_000
    chat = Chat(server.url)
    assert text_of(done(chat.say(text))[0]) == f"You said: {text}"


def mutated(body, chance: random.Random):
    """The JSON value with something in it changed, removed, added or replaced."""
    strange = [
        None,
        True,
        0,
        -1,
        10**400,
        1.5,
        "",
        "\x00",
        "thr_x",
        "ü" * 50,
        [],
        {},
        [[[]]],
        {"type": "x"},
        "a" * 10_000,
    ]
    if isinstance(body, dict) and body and chance.random() < 0.8:
        name = chance.choice(list(body))
        match chance.randrange(4):
            case 0:
                return {key: value for key, value in body.items() if key != name}
            case 1:
                return {
                    **body,
                    chance.choice(["x", "thread_id", "after", "limit"]): chance.choice(strange),
                }
            case _:
                return {**body, name: mutated(body[name], chance)}
    if isinstance(body, list) and body and chance.random() < 0.7:
        return [mutated(body[0], chance), *body[1:]] * chance.choice([1, 1, 3])
    return chance.choice(strange)


@pytest.mark.slow
def test_fuzz(server):
    """800 mutated requests from a fixed seed.

    None is answered with 500 or more, or breaks its stream.
    """
    chance = random.Random(20261122)
    chat = Chat(server.url)
    reply = done(chat.say("hello"))[0].id
    asked = chat.items()[0]["id"]
    thread = {"thread_id": chat.thread_id}
    action = {"type": "a", "payload": {"b": 1}}
    seeds = [
        {"type": "threads.create", "params": {"input": message("hi", quoted_text="q")}},
        {"type": "threads.add_user_message", "params": {**thread, "input": message("hi")}},
        {"type": "threads.add_client_tool_output", "params": {**thread, "result": {"a": [1]}}},
        {"type": "threads.retry_after_item", "params": {**thread, "item_id": asked}},
        {"type": "threads.custom_action", "params": {**thread, "item_id": reply, "action": action}},
        {"type": "threads.get_by_id", "params": thread},
        {"type": "threads.list", "params": {"limit": 2, "order": "asc", "after": chat.thread_id}},
        {"type": "threads.update", "params": {**thread, "title": "t"}},
        {"type": "items.list", "params": {**thread, "limit": 2, "order": "desc", "after": reply}},
        {"type": "items.feedback", "params": {**thread, "item_ids": [reply], "kind": "positive"}},
        {
            "type": "attachments.create",
            "params": {"name": "a", "size": 1, "mime_type": "text/plain"},
        },
        {"type": "attachments.delete", "params": {"attachment_id": "atc_x"}},
    ]
    counts: dict[int, int] = {}
    start, began = len(server.log), time.monotonic()
    for number in range(800):
        body = seeds[number % len(seeds)]
        for _ in range(chance.randint(0, 2)):
            body = mutated(body, chance)
        content = bytearray(json.dumps(body).encode())
        if chance.random() < 0.2:
            for _ in range(chance.randint(1, 5)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        response = chat.http.post("/chatkit", content=bytes(content))  # reads the stream to its end
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (content[:500], response.text)
        if response.status_code != 200:
            assert isinstance(response.json()["detail"], str)
    print(f"fuzz: {counts} in {time.monotonic() - began:.1f} s")
    assert min(counts[200], counts[400]) > 100
    assert "Traceback" not in "\n".join(server.log[start:])


@pytest.mark.anyio
async def test_debug_threads_shows_every_page(main, monkeypatch):
    """It reads 100 rows at a time."""
    store = main.MemoryStore()
    monkeypatch.setattr(main.server, "store", store)
    for number in range(201):
        thread = main.ThreadMetadata(id=f"thr_{number}", created_at=datetime.now())
        await store.save_thread(thread, {})
    for number in range(201):
        note = {"id": f"itm_{number}", "thread_id": "thr_7", "content": number}
        item = main.HiddenContextItem(created_at=datetime.now(), **note)
        await store.add_thread_item("thr_7", item, {})
    shown = json.loads("".join([piece async for piece in main.debug_json({})]))
    assert list(shown) == [f"thr_{number}" for number in range(201)]
    assert [item["id"] for item in shown["thr_7"]["items"]] == [f"itm_{n}" for n in range(201)]
    assert [shown[id]["count"] for id in ("thr_7", "thr_8")] == [201, 0]


def test_health_and_pages_from_elsewhere(server):
    assert httpx.get(f"{server.url}/health", verify=NO_TLS).json() == {"status": "ok"}
    preflight = httpx.options(
        f"{server.url}/chatkit",
        verify=NO_TLS,
        headers={"Origin": "https://example.com", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in ("*", "https://example.com")


def test_the_stream_is_not_held_back_by_proxies(server):
    body = {"type": "threads.create", "params": {"input": message("hi")}}
    response = httpx.post(f"{server.url}/chatkit", verify=NO_TLS, json=body)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
