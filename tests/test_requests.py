"""What a stranger may send: refusals, limits, origins, users, and requests that meet.

What is refused gets a 4xx with a reason, changes nothing, and leaves no traceback.
"""

import asyncio
import json
import random
import socket
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from types import MethodType

import httpx
import pytest
from agents import function_tool
from chatkit.store import AttachmentStore, NotFoundError
from chatkit.types import CustomTask, FileAttachment, HiddenContextItem, TaskItem, WidgetItem
from chatkit.widgets import Card

from client import NO_TLS, Chat, done, memory, message, text_of
from conftest import USERS
from provider import Pause, Silence, Text, ToolCall

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
    """A server with CHATKIT_TOKENS and ALLOWED_ORIGINS."""
    return servers("users")


@pytest.fixture
def alice(users):
    return Chat(users.url, USERS["alice"])


@pytest.fixture
def bob(users):
    return Chat(users.url, USERS["bob"])


@pytest.fixture
def short_answers(provider, monkeypatch):
    monkeypatch.setattr(provider, "answer", lambda _: [Text("Fine.")])


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


@contextmanager
def others_are_served(server):
    """/health answers in time as long as the block runs."""
    ended, taken = threading.Event(), [0.0]

    def ask() -> None:
        with httpx.Client(base_url=server.url, verify=NO_TLS, timeout=120) as http:
            while not ended.wait(0.01):
                began = time.monotonic()
                assert http.get("/health").json() == {"status": "ok"}
                taken.append(time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert max(taken) < SECONDS


# ---- What is refused ------------------------------------------------------------

HERE, GONE, HI = {"thread_id": "THREAD"}, {"thread_id": "thr_x"}, message("hi")
IMAGE = {"name": "a", "size": 1, "mime_type": "image/png"}
ACTION = {"type": "a", "payload": {"b": 1}}
INVALID = {
    b"": "Invalid JSON",
    b'{"type": "threads.list"': "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": "\xff\xfe"}}': "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": "\\ud800"}}': "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": NaN}}': "Invalid JSON",
    b'{"type": "threads.list", "params": {"after": ' + b"[" * 2_000: "Invalid JSON",
    b"null": "object",
    b"{}": "type",
    as_json("x" * 1000): "xxxxx",
    b'{"type": "threads.list"}': "params: Field required",
    as_json("threads.create", input={"content": "hi"}): "valid list",
    as_json("threads.list", limit="many"): "limit",
    as_json("threads.list", limit=-1): "limit must be at least 1",
    as_json("items.list", **HERE, limit=-1): "limit must be at least 1",
    as_json("threads.list", order="random"): "order",
    create([text(" \n"), text("")], quoted_text=" "): "The message is empty",
    as_json("threads.add_user_message", **HERE, input=message("")): "The message is empty",
    create([text("hi")], inference_options={"model": "gpt-5"}): "gpt-5 is not offered",
    create([text("hi")], inference_options={"tool_choice": {"id": "x"}}): "x is not offered",
    as_json("attachments.create", **IMAGE): "Attachments are not configured",
    as_json("attachments.delete", attachment_id="atc_x"): "Attachments are not configured",
    as_json("threads.add_client_tool_output", **HERE, result=1): "No client tool call is pending",
    as_json("threads.custom_action", **HERE, action=ACTION): "custom_action is not supported",
    as_json("threads.retry_after_item", **HERE, item_id="REPLY"): "is not a user_message",
}
MISSING = {
    as_json("threads.get_by_id", **GONE): "thr_x",
    as_json("threads.update", **GONE, title="t"): "thr_x",
    as_json("threads.delete", **GONE): "thr_x",
    as_json("threads.list", after="thr_x"): "thr_x",
    as_json("items.list", **GONE): "thr_x",
    as_json("items.list", **HERE, after="msg_x"): "msg_x",
    as_json("items.feedback", **GONE, item_ids=[], kind="positive"): "thr_x",
    as_json("threads.add_user_message", **GONE, input=HI): "thr_x",
    as_json("threads.add_user_message", **HERE, input=message("", attachments=["atc_x"])): "atc_x",
    as_json("threads.create", input=message("hi", attachments=["atc_x"])): "atc_x",
    as_json("threads.add_client_tool_output", **GONE, result=1): "thr_x",
    as_json("threads.custom_action", **GONE, action=ACTION): "thr_x",
    as_json("threads.retry_after_item", **GONE, item_id="msg_x"): "thr_x",
    as_json("threads.retry_after_item", **HERE, item_id="msg_x"): "msg_x",
}
REFUSED = [(400, says, body) for body, says in INVALID.items()]
REFUSED += [(404, f"{id} not found", body) for body, id in MISSING.items()]


@pytest.mark.parametrize(("status", "says", "body"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_is_refused(server, known, status, says, body):
    for name, id in known.items():
        body = body.replace(name.encode(), id.encode())
    refused(server, status, says, body)


def test_a_second_output_for_a_client_tool_call(servers, provider):
    chat = Chat(servers("customised_openai").url)
    provider.script["colour"] = [[ToolCall("pick_colour", {"hint": "warm"})], []]
    chat.say("colour")
    chat.answer("red")
    answer = chat.post("threads.add_client_tool_output", thread_id=chat.thread_id, result="blue")
    assert answer.status_code == 400 and chat.items()[1]["output"] == "red"


@pytest.mark.parametrize("where", ["the class", "the object"])
async def test_an_action(main, where):
    """It may be written in a class or on the object, and is about a widget or about nothing."""

    async def action(self, thread, action, sender, context):
        yield main.ProgressUpdateEvent(text="acted")

    async def act(**item) -> bytes:
        request = as_json("threads.custom_action", thread_id="thr_1", action=ACTION, **item)
        return b"".join([event async for event in await server.process(request, {})])

    if where == "the class":
        Server = type("Server", (main.ChatKitServerImpl,), {"action": action})
        server = type("Derived", (Server,), {})(main.MemoryStore())
    else:
        server = main.ChatKitServerImpl(main.MemoryStore())
        server.action = MethodType(action, server)
    base = {"thread_id": "thr_1", "created_at": NOW}
    widget = WidgetItem(id="wig_1", widget=Card(children=[]), **base)
    await server.store.save_thread(main.ThreadMetadata(id="thr_1", created_at=NOW), {})
    for item in (widget, TaskItem(id="tsk_1", task=CustomTask(title="t"), **base)):
        await server.store.add_thread_item("thr_1", item, {})
    assert b'"text":"acted"' in await act() and b'"text":"acted"' in await act(item_id="wig_1")
    with pytest.raises(main.HTTPException, match="Item tsk_1 is not a widget"):
        await act(item_id="tsk_1")
    with pytest.raises(NotFoundError, match="Item msg_x not found"):
        await act(item_id="msg_x")


async def test_an_attachment_of_another_user(main):
    """It cannot be deleted, or be added to a message."""
    deleted: list[str] = []

    class Files(AttachmentStore):  # it takes uploads elsewhere: not in ChatKit's two phases
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
    assert deleted == [] and await server.store.load_attachment("atc_1", alice) == attachment
    with pytest.raises(main.HTTPException, match=r"attachments\.create is not supported"):
        await server.process(as_json("attachments.create", **IMAGE), alice)
    assert [event async for event in await server.process(send, alice)]
    await server.process(delete, alice)
    with pytest.raises(NotFoundError):
        await server.process(delete, alice)
    assert deleted == ["atc_1"]


def test_a_client_that_leaves_in_the_middle_of_its_request(server):
    with server.no_new("Traceback"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /chatkit HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        Chat(server.url).say("hello")


# ---- What a request may cost ----------------------------------------------------


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
    with others_are_served(server), server.no_new(*NO_TRACE):
        for body in (
            create(many(0)),
            create(many({})),
            create(many(text(""))),
            create(many({"type": "input_tag"})),
            create([tag("x", a=many([]))]),
            json.dumps({"type": "a", "metadata": many([])}).encode(),
            create([text("x")], attachments=many("atc_x")),
            as_json("items.feedback", **GONE, item_ids=many("msg_x"), kind="positive"),
            as_json("threads.add_client_tool_output", **GONE, result=many([])),
        ):
            response = post(server, body)
            assert response.status_code == 400 and says in response.json()["detail"], body[:99]
        assert post(server, b'"' * main.MAX_BODY_BYTES).status_code == 400
    assert memory(server) - before < 64 * 1024


def test_the_bound_on_values(server, short_answers, provider, main):
    """A list and an object are values; names and the brackets of a text are none."""
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
            asked = {"limit": limit, "order": "asc", "after": page.get("after")}
            page = json.loads(
                (await main.server.process(as_json("threads.list", **asked), {})).json
            )
            seen += [row["id"] for row in page["data"]]
            assert len(page["data"]) == rows or not page["has_more"]
        assert seen == [f"thr_{id}" for id in range(count)]
    shown = await main.debug_threads({})
    assert list(shown) == seen and shown["thr_8"] == {"items": [], "count": 0}
    assert [item["id"] for item in shown["thr_7"]["items"]] == [f"itm_{id}" for id in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["words", "parts", "values"])
def test_a_thread_of_the_largest_messages(servers, short_answers, main, what):
    """All of it can be read, page by page, and nobody waits for it."""
    server, values = servers("customised_openai"), main.MAX_VALUES
    content = {
        "words": [text("a " * ((main.MAX_BODY_BYTES - 500) // 2))],
        "parts": [text("x")] * (values // 3 - 20),
        "values": [tag("x", a=[[]] * (values - 50))],
    }[what]
    chat, count = Chat(server.url), 12
    with others_are_served(server), server.no_new(*NO_TRACE):
        for _ in range(count):
            list(chat.start("", content=content))
        items, thread = [item["id"] for item in chat.items()], {"thread_id": chat.thread_id}
        assert len({*items}) == len(items) == 2 * count
        assert [item["id"] for item in chat.debug()] == items
        assert chat.post("threads.retry_after_item", item_id=items[0], **thread).is_success
        assert len(chat.items()) == 2
        assert chat.get("threads.delete", **thread) == {}


@pytest.mark.parametrize("line", [b"x-y: " + b"a" * 80 + b"\r\n", b"a" * 80], ids=["many", "long"])
def test_headers_without_end(server, line):
    """The connection is closed before they take memory."""
    if server.workers > 1:
        pytest.skip("`serve` chooses h11, which refuses them; the command line of uvicorn does not")

    def send_24_megabytes() -> None:
        for _ in range(300):
            connection.sendall(line * 1000)

    before = memory(server)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nx: ")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_24_megabytes()
        assert memory(server) - before < 4 * 1024


STRANGE = [None, True, 0, -1, 10**400, 1.5, "", "\x00", "thr_x", "ü" * 50, [], {}, [[[]]]]
STRANGE += [{"type": "x"}, "a" * 10_000, [0] * 4_990, [[]] * 2_500, {"a": "x" * 99_999}, [0] * 5001]


def mutated(body, chance: random.Random):
    """The JSON value with something in it changed, removed, added or replaced."""
    if isinstance(body, dict) and body and chance.random() < 0.8:
        name, added = chance.choice(list(body)), chance.choice(["x", "thread_id", "after", "limit"])
        match chance.randrange(4):
            case 0:
                return {key: value for key, value in body.items() if key != name}
            case 1:
                return {**body, added: chance.choice(STRANGE)}
            case _:
                return {**body, name: mutated(body[name], chance)}
    if isinstance(body, list) and body and chance.random() < 0.7:
        return [mutated(body[0], chance), *body[1:]] * chance.choice([1, 1, 3])
    return chance.choice(STRANGE)


@pytest.mark.slow
def test_a_thousand_strange_requests(servers, short_answers):
    """From a fixed seed. No 5xx, no traceback, no broken stream, and the memory is given back."""
    server, chance = servers("customised_openai"), random.Random(20261122)
    chat = Chat(server.url)
    chat.say("hello")
    asked, reply = (item["id"].encode() for item in chat.items())
    seeds = [create([text("hi"), tag("x", a=1)], quoted_text="q"), *INVALID, *MISSING]
    seeds = [body for body in seeds if body.startswith(b'{"type":"') and len(body) < 500]

    def send(count: int) -> None:
        for number in range(count):
            body = seeds[number % len(seeds)].replace(b"THREAD", chat.thread_id.encode())
            body = body.replace(b"msg_x", asked).replace(b"REPLY", reply)
            for _ in range(chance.randint(0, 2)):
                body = json.dumps(mutated(json.loads(body), chance)).encode()
            content = bytearray(body)
            for _ in range(chance.choice([0, 0, 0, 0, 3])):
                content[chance.randrange(len(content))] = chance.randrange(256)
            response = chat.http.post("/chatkit", content=bytes(content))  # to the stream's end
            statuses.append(response.status_code)
            assert response.status_code in (200, 400, 404), (content[:500], response.text)
            assert response.status_code == 200 or isinstance(response.json()["detail"], str)
            if '"type":"thread.created"' in response.text:
                id = json.loads(response.text.split("\n\n")[0][6:])["thread"]["id"]
                assert chat.get("threads.delete", thread_id=id) == {}
        chat.http.get("/collect")

    statuses: list[int] = []
    with server.no_new("Traceback"):
        send(200)  # until the allocator has reserved its memory
        before = memory(server)
        send(800)
    assert memory(server) - before < 32 * 1024
    assert min(map(statuses.count, (200, 400, 404))) > 40


# ---- From where it may come -----------------------------------------------------

FOREIGN = ["https://evil.example", "https://app.example.evil.example", "https://sub.app.example"]
FOREIGN += ["https://app.example:8443", "http://app.example", "HTTPS://APP.EXAMPLE"]
FOREIGN += ["https://app.example/", "null", "*", ""]


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("user", ["alice", None])
def test_a_page_of_another_origin(users, alice, provider, origin, user):
    """The browser sends its request without asking first, as it does with text/plain."""
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    headers |= {"Authorization": f"Bearer {USERS[user]}"} if user else {}
    before = alice.http.get("/debug/threads").text
    answers = [
        post(users, create([text("hi")]), **headers),
        get(users, "/debug/threads", **headers),
    ]
    for response in answers:
        assert response.status_code == 403 and "ALLOWED_ORIGINS" in response.json()["detail"]
        assert "access-control-allow-origin" not in response.headers
    assert alice.http.get("/debug/threads").text == before and not provider.requests


@pytest.mark.parametrize("origin", ["https://app.example", "https://other.example", None])
def test_a_page_of_an_allowed_origin(users, origin):
    headers = {
        "Authorization": f"Bearer {USERS['alice']}",
        **({"Origin": origin} if origin else {}),
    }
    for response in (
        post(users, create([text("hi")]), **headers),
        get(users, "/debug/threads", **headers),
    ):
        assert response.status_code == 200
        assert response.headers.get("access-control-allow-origin") == origin


def test_what_a_browser_asks_first(users, server):
    asked = {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization"

    def answer(server, origin: str) -> tuple[int, str | None]:
        url, headers = f"{server.url}/chatkit", {"Origin": origin, **asked}
        response = httpx.options(url, verify=NO_TLS, headers=headers)
        return response.status_code, response.headers.get("access-control-allow-origin")

    assert answer(users, "https://app.example") == (200, "https://app.example")
    assert answer(users, "https://evil.example") == (400, None)
    # Newer releases of Starlette name the origin, because of the credentials.
    assert answer(server, "https://any.example") in [(200, "*"), (200, "https://any.example")]


def test_what_is_there(users, server):
    """The documentation is closed when a token is needed. No redirect goes to a given host."""
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        assert [get(each, path).status_code for each in (users, server)] == [404, 200]
    for path in ("/chatkit/", "/health/", "/debug/threads/"):
        response = get(server, path, Host="evil.example")
        assert response.status_code == 404 and "location" not in response.headers
    headers = post(server, create([text("hi")])).headers
    assert headers["cache-control"] == "no-cache, no-transform"
    assert headers["x-accel-buffering"] == "no"


# ---- Who is asking --------------------------------------------------------------

HEADERS = ["", "Bearer", "Bearer nobody", "token-of-alice", "Basic token-of-alice"]
HEADERS += ["Bearer token-of-alic", "Bearer token-of-alice2", "Bearer \u00fc"]


@pytest.mark.parametrize("header", [None, *HEADERS])
def test_no_valid_token(users, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answers = [post(users, as_json("threads.list"), **headers)]
    for response in (*answers, get(users, "/debug/threads", **headers)):
        assert response.status_code == 401 and "token" in response.json()["detail"]
        assert response.headers["www-authenticate"] == "Bearer"
    assert not [token for token in USERS.values() if token in "\n".join(users.log)]
    assert get(users, "/health", **headers).json() == {"status": "ok"}


def test_each_user_has_threads_of_their_own(alice, bob, provider):
    """Every operation on another's says 404, and changes nothing."""
    provider.script["colour"] = [[ToolCall("pick_colour", {"hint": "warm"})]]
    for chat in (alice, bob):
        for said in ("one", "two"):
            assert [text_of(item) for item in done(chat.say(said))] == [f"You said: {said}"]
    for chat, other in ((alice, bob), (bob, alice)):
        listed = [thread["id"] for thread in chat.get("threads.list")["data"]]
        for known in (listed, chat.http.get("/debug/threads").json()):
            assert chat.thread_id in known and other.thread_id not in known
    alice.say("colour")
    asked, reply = (item["id"] for item in alice.items()[:2])
    thread = {"thread_id": alice.thread_id}
    before = alice.debug(), alice.get("threads.get_by_id", **thread)
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
        # An item of alice's under a thread of bob's own.
        ("threads.retry_after_item", {"thread_id": bob.thread_id, "item_id": asked}),
    ):
        response = bob.post(type, **params)
        assert (response.status_code, "not found" in response.text) == (404, True), type
    assert (alice.debug(), alice.get("threads.get_by_id", **thread)) == before


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


# ---- Requests that meet ---------------------------------------------------------

DELETED = "was deleted meanwhile"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["customised_openai", "sqlite"])
async def test_24_requests_to_one_thread_at_once(servers, provider, monkeypatch, where):
    """Each is answered, the thread is deleted and does not come back, and the log stays clean."""
    server, chance = servers(where), random.Random(20261125)
    steps = [Text("one "), Text("two "), Pause(0.05), Text("three")]
    monkeypatch.setattr(provider, "answer", lambda _: steps)

    async def send(type: str, params: dict) -> httpx.Response:
        await asyncio.sleep(chance.random() / 10)
        return await http.post("/chatkit", content=as_json(type, **params))

    for _ in range(5):
        chat = Chat(server.url)
        chat.say("hello")
        thread = {"thread_id": chat.thread_id}
        requests = 6 * [
            ("threads.retry_after_item", {**thread, "item_id": chat.items()[0]["id"]}),
            ("threads.add_user_message", {**thread, "input": message("more")}),
            ("threads.update", {**thread, "title": "another"}),
            ("threads.delete", thread),
        ]
        chance.shuffle(requests)
        options = {"timeout": 60, "limits": httpx.Limits(max_connections=None), "verify": NO_TLS}
        with server.no_new(*NO_TRACE):
            async with httpx.AsyncClient(base_url=server.url, **options) as http:
                answers = await asyncio.gather(*(send(*request) for request in requests))
        assert {answer.status_code for answer in answers} <= {200, 404}
        for line in "\n\n".join(answer.text for answer in answers).split("\n\n"):
            assert '"type":"error"' not in line[:25] or DELETED in line
        assert chat.post("threads.get_by_id", **thread).status_code == 404
        assert chat.thread_id not in chat.http.get("/debug/threads").json()


def local_server(main, provider):
    """A server in this process, in front of the loopback provider."""
    server = main.ChatKitServerImpl(main.MemoryStore())
    server.agent.model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")
    return server


@pytest.mark.parametrize("place", ["before it begins", "thread.updated", "text_delta"])
async def test_another_process_deletes_the_thread(main, provider, log, place):
    """The turn ends with words and one log line; a turn that has not begun is a 404."""
    silence, server, events = Silence(), local_server(main, provider), []
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    await server.store.save_thread(main.ThreadMetadata(id="thr_1", created_at=NOW), {})
    request = as_json("threads.add_user_message", thread_id="thr_1", input=message("go"))
    if place == "before it begins":
        server.check = lambda *_: server.store.delete_thread("thr_1", {})
        with pytest.raises(NotFoundError):
            await server.process(request, {})
    else:
        async for event in await server.process(request, {}):
            events.append(json.loads(event[6:]))
            if place in event.decode():
                await server.store.delete_thread("thr_1", {})
                silence.end.set()
        assert [event["type"] for event in events].count("error") == 1
        assert events[-1]["code"] == "custom" and DELETED in events[-1]["message"]
    assert not server.turns and not (await server.store.load_threads(9, None, "asc", {})).data
    assert [DELETED in record.getMessage() for record in log.records if record.levelno > 20] == (
        [True] if events else []
    )


async def test_a_missing_row_in_a_tool_is_no_deleted_thread(main, provider, log):
    """The thread is there: it is a bug in the tool, with its traceback."""

    @function_tool(failure_error_function=None)
    async def broken() -> None:
        raise NotFoundError("Order 7 not found")

    provider.script["go"] = [[ToolCall("broken")]]
    server = local_server(main, provider)
    server.agent.tools = [broken]
    request = as_json("threads.create", input=message("go"))
    events = [json.loads(event[6:]) async for event in await server.process(request, {})]
    assert events[-1]["code"] == "stream.error"
    (line,) = [record for record in log.records if record.levelname == "ERROR"]
    assert line.exc_info and "Order 7" in str(line.exc_info[1])


def test_what_the_log_tells_of_an_error(main, monkeypatch):
    """Its status and 300 characters on one line, without what is secret in the environment."""
    secrets = {"OTHER_API_KEY": "other-key-0123456789", "OLD_API_KEY": "other-key-"}  # the longest
    secrets |= {"HF_TOKEN": "token-0123456789", "DATABASE_PASSWORD": "hunter-hunter"}
    secrets["OPENAI_API_KEY"] = "any"  # what servers that need none are given
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    error = Exception("Many a company got other-key-0123456789, token-0123456789 or hunter-hunter.")
    assert "'Many a company got ***, *** or ***.'" in main.described(error)
    error = Exception("\x1b[31m\n" + "x" * 500)
    error.status_code, error.code = 422, "invalid"
    said = main.described(error)
    assert said.startswith(r"Exception 422 invalid: '\x1b[31m\nxxx") and said.count("x") == 291
