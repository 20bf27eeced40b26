"""What a stranger may send. A refusal is a 4xx with a reason, and changes nothing."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx
import pytest
from chatkit.errors import CustomStreamError
from chatkit.store import AttachmentStore, NotFoundError
from chatkit.types import FileAttachment, HiddenContextItem, WidgetItem
from chatkit.widgets import Card
from pydantic import ValidationError

from client import NO_TLS, Chat, Local, done, memory, message, text_of
from conftest import USERS
from provider import Silence, Text, ToolCall

NOW = datetime(2026, 1, 1)
NO_TRACE = ("Traceback", "Exception", "ERROR")
SECONDS = 2  # the longest /health may take meanwhile; on an idle machine it is a tenth of that


@pytest.fixture(scope="module")
def server(servers):
    """One provider will do: most of these requests never reach it."""
    return servers("openai")


@pytest.fixture(scope="module")
def known(server) -> dict[str, str]:
    """The ids of a thread and of a reply in it."""
    chat = Chat(server.url)
    reply = done(chat.say("hello"))[0].id
    return {"THREAD": chat.thread_id, "REPLY": reply}


@pytest.fixture
def users(servers):
    """A server with USERS and ALLOWED_ORIGINS."""
    return servers("users")


@pytest.fixture
def alice(users):
    return Chat(users.url, USERS["alice"])


def as_json(type: str, **params) -> bytes:
    return json.dumps({"type": type, "params": params}, separators=(",", ":")).encode()


def create(content: list, **more) -> bytes:
    return as_json("threads.create", input=message("") | {"content": content} | more)


def text(value: str) -> dict:
    return {"type": "input_text", "text": value}


def tag(name: str, **data) -> dict:
    return {"type": "input_tag", "id": name, "text": name, "data": data}


def post(server, content, **headers: str) -> httpx.Response:
    url = f"{server.url}/chatkit"
    return httpx.post(url, verify=NO_TLS, content=content, timeout=300, headers=headers)


def get(server, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", verify=NO_TLS, timeout=300, headers=headers)


def refused(server, status: int, says: str, content) -> None:
    before = get(server, "/debug/threads").json()
    with server.no_new(*NO_TRACE):
        response = post(server, content)
        assert response.status_code == status and says in response.json()["detail"], response.text
        assert set(response.json()) == {"detail"} and len(response.text) < 500
        assert get(server, "/debug/threads").json() == before


HERE, HI = {"thread_id": "THREAD"}, message("hi")
IMAGE = {"name": "a", "size": 1, "mime_type": "image/png"}
ACTION = {"type": "a", "payload": {"b": 1}}
INVALID = {
    b"": "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": "\\ud800"}}': "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": NaN}}': "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": ' + b"[" * 2_000: "Invalid JSON",
    b"null": "object",
    as_json("x" * 1000): "xxxxx",
    as_json("items.list", **HERE, limit=-1): "limit must be at least 1",
    create([text(" \n"), text("")], quoted_text=" "): "The message is empty",
    create([text("hi")], inference_options={"model": "some-model"}): "some-model is not offered",
    create([text("hi")], inference_options={"tool_choice": {"id": "x"}}): "x is not offered",
    as_json("attachments.create", **IMAGE): "Attachments are not configured",
    as_json("attachments.delete", attachment_id="atc_x"): "Attachments are not configured",
    as_json("threads.add_client_tool_output", **HERE, result=1): "No client tool call is pending",
    as_json("threads.custom_action", **HERE, action=ACTION): "custom_action is not supported",
    as_json("threads.retry_after_item", **HERE, item_id="REPLY"): "is not a user_message",
}
MISSING = {
    as_json("threads.get_by_id", thread_id="thr_x"): "thr_x",
    as_json("threads.list", after="thr_x"): "thr_x",
    as_json("items.list", **HERE, after="msg_x"): "msg_x",
    as_json("threads.create", input=message("hi", attachments=["atc_x"])): "atc_x",
    as_json("threads.retry_after_item", **HERE, item_id="msg_x"): "msg_x",
    as_json("threads.retry_after_item", **HERE, item_id=""): "Item ",
}
REFUSED = [(400, says, body) for body, says in INVALID.items()]
REFUSED += [(404, f"{id} not found", body) for body, id in MISSING.items()]


@pytest.mark.parametrize(("status", "says", "body"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused(server, known, status, says, body):
    for name, id in known.items():
        body = body.replace(name.encode(), id.encode())
    refused(server, status, says, body)


async def test_an_action(main):
    """It is about a widget or about nothing."""

    class Acting(main.ChatKitServerImpl):
        async def action(self, thread, action, sender, context):
            yield main.ProgressUpdateEvent(text="acted")

    async def act(**item) -> bytes:
        params = {"action": ACTION, **local.thread, **item}
        turn = (await local.process("threads.custom_action", **params)).json_events
        return b"".join([event async for event in turn])

    local = Local(main)
    await local.say("hello")
    local.server = Acting(local.server.store)
    widget = WidgetItem(id="wig_1", widget=Card(children=[]), created_at=NOW, **local.thread)
    await local.server.store.add_thread_item(widget.thread_id, widget, {})
    for about in ({}, {"item_id": ""}, {"item_id": "wig_1"}):
        assert b'"text":"acted"' in await act(**about)
    with pytest.raises(main.HTTPException, match="is not a widget"):
        await act(item_id=(await local.items())[0].id)
    with pytest.raises(NotFoundError, match="Item msg_x not found"):
        await act(item_id="msg_x")


async def test_an_attachment_of_another_user(main):
    """It cannot be deleted, or be added to a message."""
    deleted: list[str] = []

    class Files(AttachmentStore):
        async def delete_attachment(self, attachment_id, context):
            deleted.append(attachment_id)

    alice, bob = {"user_id": "alice"}, {"user_id": "bob"}
    server = main.ChatKitServerImpl(main.MemoryStore(), Files())
    attachment = FileAttachment(id="atc_1", name="a.txt", mime_type="text/plain")
    await server.store.save_attachment(attachment, alice)
    send = as_json("threads.create", input=message("", attachments=["atc_1"]))  # without a text
    delete = as_json("attachments.delete", attachment_id="atc_1")
    for request in (delete, send):
        with pytest.raises(NotFoundError, match="Attachment atc_1 not found"):
            await server.process(request, bob)
    with pytest.raises(main.HTTPException, match=r"400: attachments\.create is not supported"):
        await server.process(as_json("attachments.create", **IMAGE), alice)
    sent = [event async for event in await server.process(send, alice)]
    assert sent and b'"title"' not in b"".join(sent) and deleted == []
    await server.process(delete, alice)
    assert deleted == ["atc_1"]


async def test_what_a_store_raises(main, log):
    """A ValueError is a 400. But pydantic's shows a row, and a retry is what the Store says."""

    class Broken(main.MemoryStore):
        async def load_threads(self, *_, **__):
            raise errors.pop()

    with pytest.raises(ValidationError) as corrupt:
        FileAttachment(id="a secret")
    errors = [corrupt.value, ValueError("no such page")]
    server, listing = main.ChatKitServerImpl(Broken()), as_json("threads.list")
    for expected, says in ((main.HTTPException, "400: no such page"), (ValidationError, "secret")):
        with pytest.raises(expected, match=says):
            await server.process(listing, {})
    assert main.error_event(CustomStreamError("It is full.", allow_retry=True)).allow_retry


def test_a_login_without_a_user_id(main):
    assert [main.user_of(context) for context in ({}, {"user_id": "7"})] == ["", "7"]
    with pytest.raises(KeyError, match="user_id"):
        main.user_of({"session": "of alice"})


def test_a_client_that_leaves_in_the_middle_of_its_request(server):
    with server.no_new("Traceback"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /chatkit HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        Chat(server.url).say("hello")


def test_too_long(server, main):
    """Whether it says its length or not; and it is not held in memory."""
    says = f"longer than {main.MAX_BODY_BYTES} bytes"
    refused(server, 413, says, create([text("x" * main.MAX_BODY_BYTES)]))
    before = memory(server)
    refused(server, 413, says, (b" " * 65536 for _ in range(2048)))  # 128 MiB
    assert memory(server) - before < 32 * 1024


def test_the_worst_requests_are_refused_at_once(server, main):
    """By the number of their values: neither they nor the errors in them are built."""

    def many(value) -> list:
        return [value] * ((main.MAX_BODY_BYTES - 500) // (len(json.dumps(value)) + 2))

    before, says = memory(server), f"more than {main.MAX_VALUES} JSON values"
    with ThreadPoolExecutor(1) as pool, server.no_new(*NO_TRACE):
        for body in (
            create(many({"type": "input_tag"})),
            create([tag("x", a=many([]))]),
            create([text("x")], attachments=many("atc_x")),
            json.dumps({"type": "a", "metadata": many([])}).encode(),
        ):
            answer = pool.submit(post, server, body)
            while not answer.done():  # others are served
                began = time.monotonic()
                assert get(server, "/health").json() == {"status": "ok"}
                assert time.monotonic() - began < SECONDS
            assert answer.result().status_code == 400
            assert says in answer.result().json()["detail"], body[:99]
        assert post(server, b'"' * main.MAX_BODY_BYTES).status_code == 400
    assert memory(server) - before < 64 * 1024


def test_the_bound_on_values(server, provider, main, monkeypatch):
    """A list and an object are values; names and the brackets of a text are none."""
    monkeypatch.setattr(provider, "answer", lambda _: [Text("Fine.")])
    quote = '[{"a",\\"b\\\\",' * 1000
    around = main.count_values(json.loads(create([tag("x", a=[])], quoted_text=quote)))
    assert around == 14
    for extra, status in ((0, 200), (1, 400)):
        values = [0] * (main.MAX_VALUES - around + extra)
        assert post(server, create([tag("x", a=values)], quoted_text=quote)).status_code == status
    assert len(provider.requests) == 1


async def test_pages(main, monkeypatch):
    """They have MAX_PAGE rows at most, whatever is asked for, and they end."""
    store, count = main.MemoryStore(), 2 * main.MAX_PAGE + 1
    monkeypatch.setattr(main.server, "store", store)
    for id in range(count):
        await store.save_thread(main.ThreadMetadata(id=f"thr_{id}", created_at=NOW), {})
    for id in range(count):
        note = {"id": f"itm_{id}", "thread_id": "thr_7", "created_at": NOW}
        await store.add_thread_item("thr_7", HiddenContextItem(content=id, **note), {})
    for limit, rows in ((None, 20), (0, 20), (1, 1), (10**30, main.MAX_PAGE)):
        seen, page = [], {"has_more": True}
        while page["has_more"]:
            request = as_json("threads.list", limit=limit, order="asc", after=page.get("after"))
            page = json.loads((await main.server.process(request, {})).json)
            assert len(page["data"]) == min(rows, count - len(seen))
            seen += [row["id"] for row in page["data"]]
        assert seen == [f"thr_{id}" for id in range(count)]
    shown = await main.debug_threads({})
    assert list(shown) == seen and shown["thr_8"] == {"items": [], "count": 0}
    assert [item["id"] for item in shown["thr_7"]["items"]] == [f"itm_{id}" for id in range(count)]


def test_headers_without_end(server):
    """The connection is closed before they take memory."""
    if server.workers > 1:
        pytest.skip("`serve` chooses h11, which refuses them; the command line of uvicorn does not")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nx: ")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b"a" * 24_000_000)


FOREIGN = ["https://evil.example", "https://app.example.evil.example", "http://app.example"]
FOREIGN += ["https://app.example/", "null", ""]


def test_a_page_of_another_origin(users, alice, provider):
    """The browser sends its request without asking first, as it does with text/plain."""
    before = alice.http.get("/debug/threads").text
    for origin in FOREIGN:
        headers = {"Origin": origin, "Content-Type": "text/plain", **alice.http.headers}
        for response in (
            post(users, create([text("hi")]), **headers),
            get(users, "/debug/threads", **headers),
        ):
            assert response.status_code == 403 and "ALLOWED_ORIGINS" in response.json()["detail"]
            assert "access-control-allow-origin" not in response.headers
    assert alice.http.get("/debug/threads").text == before and not provider.requests


def test_a_page_of_an_allowed_origin(users, alice, server):
    """What it asks, and what its browser asks before; and a server that allows every page."""
    asked = {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization"

    def answer(where, method: str, origin: str, **headers: str) -> tuple[int, str | None]:
        url, body = f"{where.url}/chatkit", create([text("hi")]) if method == "POST" else None
        headers |= {"Origin": origin}
        response = httpx.request(method, url, verify=NO_TLS, headers=headers, content=body)
        return response.status_code, response.headers.get("access-control-allow-origin")

    for origin in ("https://app.example", "https://other.example"):
        assert answer(users, "POST", origin, **alice.http.headers) == (200, origin)
        assert answer(users, "OPTIONS", origin, **asked) == (200, origin)
    assert answer(users, "OPTIONS", "https://evil.example", **asked) == (400, None)
    # Newer releases of Starlette name the origin, because of the credentials.
    anyone = [(200, "*"), (200, "https://any.example")]
    assert answer(server, "OPTIONS", "https://any.example", **asked) in anyone


def test_what_is_there(server):
    """No redirect goes to a given host, and no proxy holds the events back."""
    for path in ("/chatkit/", "/health/", "/debug/threads/"):
        response = get(server, path, Host="evil.example")
        assert response.status_code == 404 and "location" not in response.headers
    headers = post(server, create([text("hi")])).headers
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"


def test_each_user_has_threads_of_their_own(users, alice):
    """Every operation on another's says 404, and changes nothing."""
    bob = Chat(users.url, USERS["bob"])
    for chat in (alice, bob):
        assert [text_of(item) for item in done(chat.say("one"))] == ["You said: one"]
    for chat, other in ((alice, bob), (bob, alice)):
        listed = [thread["id"] for thread in chat.get("threads.list")["data"]]
        for known in (listed, chat.http.get("/debug/threads").json()):
            assert chat.thread_id in known and other.thread_id not in known
    asked, reply = (item["id"] for item in alice.items())
    thread = {"thread_id": alice.thread_id}
    before = alice.debug(), alice.thread()
    for type, params in (
        ("threads.get_by_id", thread),
        ("threads.update", {**thread, "title": "stolen"}),
        ("threads.delete", thread),
        ("threads.list", {"after": alice.thread_id}),
        ("items.list", thread),
        ("items.feedback", {**thread, "item_ids": [reply], "kind": "positive"}),
        ("threads.add_user_message", {**thread, "input": HI}),
        ("threads.add_client_tool_output", {**thread, "result": "red"}),
        ("threads.retry_after_item", {**thread, "item_id": asked}),
        ("threads.custom_action", {**thread, "action": ACTION}),
        ("threads.retry_after_item", {"thread_id": bob.thread_id, "item_id": asked}),
    ):
        response = bob.post(type, **params)
        assert (response.status_code, "not found" in response.text) == (404, True), type
    assert (alice.debug(), alice.thread()) == before


def test_nobody_forges_what_the_application_says(servers, provider):
    """A user who repeats all that the model was told is still a user."""
    chat = Chat(servers("customised_openai").url)
    provider.script["show me"] = [[ToolCall("show_card")], [Text("Here.")]]
    chat.say("show me")
    chat.say("and on")
    told = "\n".join(said for _, said in provider.requests[-1].messages)
    assert told.count("<HiddenContext>\na hidden note\n</HiddenContext>") == 1
    content = [text(told), tag("x", note=told) | {"text": told}]
    list(chat.start("", content=content, quoted_text=told))
    request = json.dumps(provider.requests[-1].body["messages"])
    assert request.count("HiddenContext >") == 10 and request.count("HiddenContext>") == 2


async def test_another_process_deletes_the_thread(main, provider, log):
    """The turn ends with words and one log line."""
    silence, local = Silence(), Local(main, provider)
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    events = []
    async for event in await local.start("go"):
        events.append(json.loads(event[6:]))
        if b"text_delta" in event:
            await local.server.store.delete_thread(local.thread["thread_id"], {})
            silence.end.set()
    assert [event["type"] for event in events].count("error") == 1
    assert (events[-1]["code"], events[-1]["message"]) == ("custom", main.DELETED)
    assert not local.server.turns and not await local.items()
    (line,) = [record for record in log.records if record.levelname != "INFO"]
    assert main.DELETED in line.getMessage() and not line.exc_info
