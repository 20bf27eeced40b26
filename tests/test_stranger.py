"""Whoever reaches the port: what a request may cost, from where it may come, what the log tells."""

import asyncio
import http.client
import json
import random
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from unittest.mock import Mock

import httpx
import pytest
from agents import function_tool
from chatkit.store import NotFoundError

from client import NO_TLS, Chat, memory, message, until
from conftest import USERS
from provider import Anthropic, Failure, Gemini, OpenAI, Pause, Silence, Text, ToolCall

pytestmark = pytest.mark.anyio
SECONDS = 2  # the longest /health may take meanwhile; on an idle machine it is a tenth of that
NO_TRACE = ("Traceback", "Exception", "ERROR")


@pytest.fixture(scope="module")
def server(servers):
    return servers("customised_openai")


@pytest.fixture(autouse=True)
def short_answers(provider, monkeypatch):
    monkeypatch.setattr(provider, "answer", lambda _: [Text("Fine.")])


@contextmanager
def others_are_served(server):
    """/health answers in time as long as the block runs."""
    ended = threading.Event()
    taken = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while not ended.wait(0.01):
            began = time.monotonic()
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            taken.append(time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert max(taken, default=0) < SECONDS


def as_json(type: str, **params) -> bytes:
    return json.dumps({"type": type, "params": params}, separators=(",", ":")).encode()


def create(content: list, **more) -> bytes:
    return as_json("threads.create", input=message("") | {"content": content} | more)


def tag(name: str, **data) -> dict:
    return {"type": "input_tag", "id": name, "text": name, "data": data}


def text(value: str) -> dict:
    return {"type": "input_text", "text": value}


# ---- What a request may cost ----------------------------------------------------


def worst_requests(main) -> dict[str, bytes]:
    """The requests of the greatest size that held the event loop for seconds, or took memory."""
    size = main.MAX_BODY_BYTES - 500

    def many(value) -> list:
        return [value] * (size // (len(json.dumps(value)) + 1))

    return {
        "zeros": create(many(0)),
        "objects": create(many({})),
        "texts": create(many({"type": "input_text", "text": ""})),
        "tags": create(many(tag("x"))),
        "tags without fields": create(many({"type": "input_tag"})),
        "lists in a tag": create([tag("x", a=many([]))]),
        "lists in the metadata": json.dumps(
            {"type": "threads.list", "params": {}, "metadata": {"a": many([])}}
        ).encode()[: main.MAX_BODY_BYTES],
        "quotes": b'"' * size,
        "attachments": create([text("x")], attachments=many("atc_x")),
        "ids": as_json(
            "items.feedback", thread_id="thr_x", item_ids=many("msg_x"), kind="positive"
        ),
    }


def test_the_worst_requests_are_refused_at_once(server, main):
    """Each by its size alone: neither it nor the errors in it are built."""
    before = memory(server)
    with others_are_served(server), server.no_new(*NO_TRACE):
        for name, body in worst_requests(main).items():
            response = httpx.post(f"{server.url}/chatkit", verify=NO_TLS, content=body, timeout=300)
            assert response.status_code == 400, name
            if name != "quotes":
                assert f"more than {main.MAX_VALUES} JSON values" in response.json()["detail"], name
    assert memory(server) - before < 64 * 1024


LIMITS = {
    "MAX_PARTS": lambda count: [text("x")] * count,
    "MAX_TAGS": lambda count: [tag("x")] * count,
    "MAX_VALUES": lambda count: [tag("x", a=[0] * count)],
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_message_at_its_limit_and_over_it(server, provider, main, name):
    """The answer names the limit. Commas and brackets in a text are no values."""
    limit = getattr(main, name)
    quote = '[{"a",\\"b\\\\",' * 1000
    around = 0
    if name == "MAX_VALUES":
        around = main.count_values(create(LIMITS[name](1), quoted_text=quote)) - 1
    for count, status in ((limit, 200), (limit + 1, 400)):
        body = create(LIMITS[name](count - around), quoted_text=quote)
        response = httpx.post(f"{server.url}/chatkit", verify=NO_TLS, content=body)
        assert response.status_code == status, response.text[:500]
    assert f"more than {limit} " in response.json()["detail"]
    assert len(provider.requests) == 1


def test_too_many_attachments(server, main):
    body = message("hi", attachments=["atc_x"] * (main.MAX_IDS + 1))
    response = Chat(server.url).post("threads.create", input=body)
    assert (response.status_code, response.json()["detail"]) == (
        400,
        f"There are more than {main.MAX_IDS} attachments in a message.",
    )


def test_a_title_at_its_limit_and_over_it(server, main):
    chat = Chat(server.url)
    chat.say("hello")
    for length, status in ((main.MAX_TITLE, 200), (main.MAX_TITLE + 1, 400)):
        response = chat.post("threads.update", thread_id=chat.thread_id, title="x" * length)
        assert response.status_code == status
    assert str(main.MAX_TITLE) in response.json()["detail"]
    thread = chat.get("threads.get_by_id", thread_id=chat.thread_id)
    assert thread["title"] == "x" * main.MAX_TITLE


async def test_each_item_of_a_feedback_is_loaded_once(main):
    loaded = []

    class Counting(main.MemoryStore):
        async def load_item(self, thread_id, item_id, context):
            loaded.append(item_id)
            return await super().load_item(thread_id, item_id, context)

    class Server(main.ChatKitServerImpl):
        async def add_feedback(self, thread_id, item_ids, feedback, context):
            told.append((item_ids, feedback))

    told: list = []
    server = Server(Counting())
    request = as_json("threads.create", input=message("hello"))
    events = [json.loads(event[6:]) async for event in await server.process(request, {})]
    thread_id = events[0]["thread"]["id"]
    ids = [event["item"]["id"] for event in events if event["type"] == "thread.item.done"]
    assert len(ids) == 2
    loaded.clear()
    feedback = {"thread_id": thread_id, "kind": "positive"}
    await server.process(as_json("items.feedback", **feedback, item_ids=ids * 1000), {})
    assert (loaded, told) == (ids, [(ids, "positive")])

    too_many = [f"msg_{number}" for number in range(main.MAX_IDS + 1)]
    with pytest.raises(main.HTTPException) as refused:
        await server.process(as_json("items.feedback", **feedback, item_ids=too_many), {})
    assert (refused.value.status_code, loaded) == (400, ids)
    assert str(main.MAX_IDS) in refused.value.detail


LONG_THREADS = {
    "words": lambda main: [text("a " * ((main.MAX_BODY_BYTES - 500) // 2))],
    "parts": lambda main: [text("x")] * main.MAX_PARTS,
    "tags": lambda main: [tag(f"tag {number}", a=[0] * 60) for number in range(main.MAX_TAGS)],
    "values": lambda main: [tag("x", a=[[]] * (main.MAX_VALUES // 2 - 20))],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LONG_THREADS)
def test_a_thread_of_the_largest_messages(server, provider, main, what):
    """All of it can be read, page by page, and nobody waits for it."""
    input = message("") | {"content": LONG_THREADS[what](main)}
    count = 12
    chat = Chat(server.url)
    with others_are_served(server), server.no_new(*NO_TRACE):
        list(chat.stream("threads.create", input=input))
        thread = {"thread_id": chat.thread_id}
        for _ in range(count - 1):
            assert chat.post("threads.add_user_message", input=input, **thread).is_success
        items, after = [], None
        while True:
            page = chat.post("items.list", order="asc", limit=10**6, after=after, **thread)
            assert len(page.content) < main.PAGE_BYTES + 4096
            items += page.json()["data"]
            after = page.json().get("after")
            if after is None:
                break
        assert len({item["id"] for item in items}) == len(items) == 2 * count
        first = chat.get("threads.get_by_id", **thread)["items"]
        assert first["data"] == items[: len(first["data"])] and first["has_more"]
        assert [item["id"] for item in chat.debug()] == [item["id"] for item in items]
        told = provider.requests[-1].body["messages"]
        assert len(json.dumps(told)) < 2 * main.PAGE_BYTES
        assert chat.post("threads.retry_after_item", item_id=items[0]["id"], **thread).is_success
        assert len(chat.items()) == 2
        assert chat.get("threads.delete", **thread) == {}


async def test_a_page_has_at_most_so_many_rows(main):
    asked = []

    class Counting(main.MemoryStore):
        async def load_threads(self, limit, after, order, context):
            asked.append(limit)
            return await super().load_threads(limit, after, order, context)

    server = main.ChatKitServerImpl(Counting())
    for limit in (None, 1, main.MAX_PAGE, main.MAX_PAGE + 1, 10**30):
        await server.process(as_json("threads.list", limit=limit), {})
    assert asked == [20, 1, main.MAX_PAGE, main.MAX_PAGE, main.MAX_PAGE]


def test_a_long_tool_output_of_a_client(server, provider, main):
    chat = Chat(server.url)
    provider.script["colour"] = [[ToolCall("pick_colour", {"hint": "warm"})], [Text("Fine.")]]
    chat.say("colour")
    thread = {"thread_id": chat.thread_id}
    result: list = [[]] * main.MAX_VALUES
    response = chat.post("threads.add_client_tool_output", **thread, result=result)
    assert response.status_code == 400 and str(main.MAX_VALUES) in response.text
    result = [[]] * (main.MAX_VALUES // 2 - 20)
    with others_are_served(server):
        response = chat.post("threads.add_client_tool_output", **thread, result=result)
    assert response.status_code == 200
    assert chat.items()[1]["output"] == result


# ---- From where it may come -----------------------------------------------------

FOREIGN = [
    "https://evil.example",
    "https://app.example.evil.example",
    "https://sub.app.example",
    "https://app.example:8443",
    "http://app.example",
    "HTTPS://APP.EXAMPLE",
    "https://app.example/",
    "null",
    "*",
    "",
]


@pytest.fixture
def strict(servers):
    """A server with ALLOWED_ORIGINS and CHATKIT_TOKENS."""
    return servers("users")


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("user", [*USERS, None])
def test_a_page_of_another_origin(strict, provider, origin, user):
    """The browser sends its request without asking first, as it does with text/plain."""
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    if user:
        headers["Authorization"] = f"Bearer {USERS[user]}"
    chats = [Chat(strict.url, token) for token in USERS.values()]
    before = [chat.http.get("/debug/threads").text for chat in chats]
    with httpx.Client(base_url=strict.url, verify=NO_TLS, headers=headers) as http:
        body = create([text("Hello from elsewhere")])
        for response in (http.post("/chatkit", content=body), http.get("/debug/threads")):
            assert response.status_code == 403
            assert set(response.json()) == {"detail"} and "ALLOWED_ORIGINS" in response.text
            assert "access-control-allow-origin" not in response.headers
    assert [chat.http.get("/debug/threads").text for chat in chats] == before
    assert not provider.requests


@pytest.mark.parametrize("origin", ["https://app.example", "https://other.example", None])
def test_a_page_of_an_allowed_origin(strict, provider, origin):
    headers = {"Origin": origin} if origin else {}
    chat = Chat(strict.url, USERS["alice"])
    response = chat.http.post("/chatkit", content=create([text("Hello")]), headers=headers)
    assert response.status_code == 200 and "Fine." in response.text
    assert response.headers.get("access-control-allow-origin") == origin
    assert chat.http.get("/debug/threads", headers=headers).status_code == 200


def test_any_origin_unless_some_are_named(server):
    headers = {"Origin": "https://anywhere.example"}
    for response in (
        httpx.post(f"{server.url}/chatkit", verify=NO_TLS, headers=headers, content=create([])),
        httpx.get(f"{server.url}/debug/threads", verify=NO_TLS, headers=headers),
    ):
        assert response.status_code in (200, 400)
        # Newer releases of Starlette name the origin, because of the credentials.
        assert response.headers["access-control-allow-origin"] in ("*", headers["Origin"])


def test_the_documentation_is_closed_when_a_token_is_needed(strict, server):
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        assert httpx.get(f"{strict.url}{path}", verify=NO_TLS).status_code == 404
        assert httpx.get(f"{server.url}{path}", verify=NO_TLS).status_code == 200


@pytest.mark.parametrize("path", ["/chatkit/", "/health/", "/debug/threads/"])
def test_no_redirect_to_a_host_of_the_clients_choice(server, path):
    for method in ("GET", "POST"):
        response = httpx.request(
            method, f"{server.url}{path}", verify=NO_TLS, headers={"Host": "evil.example"}
        )
        assert response.status_code == 404 and "location" not in response.headers


# ---- Connections that take their time -------------------------------------------


@pytest.fixture
def impatient(servers):
    """A server whose BODY_SECONDS and READ_SECONDS are 1."""
    return servers("impatient")


def begun(server, start: bytes, holds: int = 4096) -> socket.socket:
    """A connection on which this much of a request has been sent, and what it holds unread."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, holds)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(start)
    return connection


def head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("drops", [0, 20], ids=["silent", "dripping"])
def test_a_body_that_does_not_arrive(impatient, provider, drops):
    """A 408, and the connection is closed, also for a client that sends a byte now and then."""
    body = create([text("hello")])
    with impatient.no_new(*NO_TRACE), begun(impatient, head("/chatkit", len(body) + 99)) as client:
        client.sendall(body)
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(drops):
                time.sleep(0.1)
                client.sendall(b" ")
        with suppress(ConnectionResetError):  # if drops came after the end
            answer = received(client)
            assert answer.startswith(b"HTTP/1.1 408 ") and b"within 1 seconds" in answer
    assert not provider.requests


@pytest.mark.slow
async def test_a_client_that_reads_nothing(impatient, provider):
    """The connection is cut off; the turn is stopped, and what it had is stored."""
    piece = "x" * 100_000
    provider.script["go"] = [[*[Text(piece) for _ in range(200)], Silence()]]
    chat = Chat(impatient.url)
    chat.say("hello")
    body = as_json("threads.add_user_message", thread_id=chat.thread_id, input=message("go"))
    with impatient.no_new(*NO_TRACE), begun(impatient, head("/chatkit", len(body)) + body):
        impatient.wait_for("read nothing for 1 s", seconds=20)
        assert await asyncio.to_thread(provider.requests[-1].closed.wait, 5)
        await until(lambda: chat.debug()[-1]["type"] == "SDKHiddenContextItem")
    asked, reply = chat.items()[-2:]
    assert asked["content"][0]["text"] == "go"
    assert set(reply["content"][0]["text"]) == {"x"}


@pytest.mark.slow
def test_a_client_that_reads_slowly_is_served(impatient, provider):
    """It takes longer than READ_SECONDS for all of it, but it reads something all the time."""
    provider.script["go"] = [[Text("x" * 100_000) for _ in range(120)]]
    body = create([text("go")])
    with begun(impatient, head("/chatkit", len(body)) + body, 100_000) as client:
        answer, began = b"", time.monotonic()
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            part = client.recv(1_000_000)
            assert part, answer[-1000:]
            answer += part
            if time.monotonic() - began < 3:
                time.sleep(0.02)
    assert answer.count(b'"delta":"xxx') == 120


@pytest.mark.slow
def test_a_debug_page_that_is_not_read(impatient, provider):
    provider.script["go"] = [[Text("x" * 500_000)]]
    chat = Chat(impatient.url)
    for _ in range(20):
        chat.say("go")
    with impatient.no_new(*NO_TRACE):
        times = "\n".join(impatient.log).count("read nothing")
        with begun(impatient, b"GET /debug/threads HTTP/1.1\r\nHost: x\r\n\r\n"):
            impatient.wait_for("read nothing for 1 s", times + 1, seconds=20)
    chat.get("threads.delete", thread_id=chat.thread_id)


@pytest.mark.parametrize("line", [b"x-y: " + b"a" * 80 + b"\r\n", b"a" * 80], ids=["many", "long"])
def test_headers_without_end(impatient, line):
    """The connection is closed before they take memory."""

    def send_24_megabytes() -> None:
        for _ in range(300):
            client.sendall(line * 1000)

    before = memory(impatient)
    with begun(impatient, b"GET /health HTTP/1.1\r\nHost: x\r\nx: ") as client:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_24_megabytes()
        assert memory(impatient) - before < 4 * 1024


# ---- Requests that meet ---------------------------------------------------------


def local_server(main, store, provider):
    """The server in this process, on this store and the loopback provider."""
    server = main.ChatKitServerImpl(store)
    server.agent.model = main.ProviderModel(
        model="openai/gpt-4o", base_url=f"{provider.url}/openai", api_key="key"
    )
    return server


DELETED = "was deleted meanwhile"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["customised_openai", "sqlite_1"])
async def test_24_requests_to_one_thread_at_once(servers, provider, where):
    """Each is answered, the thread is deleted and does not come back, and the log stays clean."""
    server = servers(where)
    provider.answer = lambda _: [Text("one "), Text("two "), Pause(0.05), Text("three")]
    chance = random.Random(20261125)

    async def send(http: httpx.AsyncClient, type: str, params: dict) -> httpx.Response:
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
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=limits, verify=NO_TLS
        ) as http:
            with server.no_new(*NO_TRACE):
                answers = await asyncio.gather(*(send(http, *request) for request in requests))
        assert {answer.status_code for answer in answers} <= {200, 404}
        for answer in answers:
            for line in answer.text.split("\n\n"):
                if line.startswith('data: {"type":"error"'):
                    assert DELETED in line
        assert chat.post("threads.get_by_id", **thread).status_code == 404
        assert chat.thread_id not in chat.http.get("/debug/threads").json()


@pytest.mark.parametrize("place", ["before it begins", "thread.updated", "text_delta"])
async def test_another_process_deletes_the_thread_of_a_running_turn(
    main, provider, monkeypatch, caplog, place
):
    """The turn ends with words and one log line."""
    log = Mock()
    monkeypatch.setattr(main, "logger", log)
    silence = Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    server = local_server(main, main.MemoryStore(), provider)
    thread = main.ThreadMetadata(id="thr_1", created_at=datetime.now())
    await server.store.save_thread(thread, {})
    request = as_json("threads.add_user_message", thread_id="thr_1", input=message("go"))
    answer = await server.process(request, {})
    if place == "before it begins":
        await server.store.delete_thread("thr_1", {})
    events = []
    async for event in answer:
        events.append(json.loads(event[6:]))
        if place in event.decode():
            await server.store.delete_thread("thr_1", {})
            silence.end.set()
    assert [event["type"] for event in events].count("error") == 1
    assert events[-1]["code"] == "custom" and DELETED in events[-1]["message"]
    assert not server.turns and not (await server.store.load_threads(9, None, "asc", {})).data
    (line,) = log.warning.call_args_list
    assert DELETED in line.args[1] and not log.error.called
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_missing_row_in_a_tool_is_no_deleted_thread(main, provider, caplog):
    """The thread is there: it is a bug in the tool, with its traceback."""

    @function_tool(failure_error_function=None)
    async def broken() -> None:
        raise NotFoundError("Order 7 not found")

    provider.script["go"] = [[ToolCall("broken")]]
    server = local_server(main, main.MemoryStore(), provider)
    server.agent.tools.append(broken)
    request = as_json("threads.create", input=message("go"))
    events = [json.loads(event[6:]) async for event in await server.process(request, {})]
    assert events[-1]["code"] == "stream.error"
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.exc_info and "Order 7" in str(line.exc_info[1])


async def test_a_turn_that_begins_while_its_thread_is_deleted(main, provider):
    """The deletion waits until the first turn is stored. The second must not go on after it."""
    storing, stored = asyncio.Event(), asyncio.Event()

    class Slow(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message":
                storing.set()
                await stored.wait()
            await super().add_thread_item(thread_id, item, context)

    async def read(result) -> None:
        async for event in result:
            if b"text_delta" in event:
                streams.set()

    streams = asyncio.Event()
    provider.script["one"] = provider.script["two"] = [[Text("word "), Silence()]]
    server = local_server(main, Slow(), provider)
    request = as_json("threads.create", input=message("one"))
    first = asyncio.create_task(read(await server.process(request, {})))
    await streams.wait()
    streams.clear()
    thread = {"thread_id": next(iter(server.turns)).thread_id}
    request = as_json("threads.add_user_message", **thread, input=message("two"))
    answer = await server.process(request, {})  # checked, and not begun
    deleting = asyncio.create_task(server.process(as_json("threads.delete", **thread), {}))
    await storing.wait()
    second = asyncio.create_task(read(answer))
    await streams.wait()
    stored.set()
    await asyncio.wait_for(asyncio.gather(first, second, deleting), 10)
    assert not server.turns and not (await server.store.load_threads(9, None, "asc", {})).data


# ---- Who speaks -----------------------------------------------------------------


def raw_texts(request) -> list[str]:
    """What the provider was told in the role of the user, as it came."""
    return [told for role, told in request.format.messages(request.raw) if role == "user"]


def test_nobody_forges_what_the_application_says(servers, provider, provider_name):
    """A user who repeats all that the model was told, the mark included, is still a user."""
    chat = Chat(servers(f"customised_{provider_name}").url)
    provider.script["show me"] = [[ToolCall("show_card")], [Text("Here.")]]
    chat.say("hello")
    assert "application-" not in json.dumps(provider.requests[-1].raw)  # nothing to tell apart
    chat.say("show me")
    chat.say("and on")
    request = provider.requests[-1]
    instructions = request.format.instructions(request.raw)
    mark = re.search(r"<(application-[0-9a-f]{16})>", instructions)[1]
    genuine = [told for told in raw_texts(request) if mark in told]
    for words in ("a hidden note", "a card", "a task", "a step"):
        (told,) = [told for told in genuine if words in told]
        assert told.startswith(f"<{mark}>\n") and told.endswith(f"\n</{mark}>")

    tagged = tag("x", note=genuine[0]) | {"text": genuine[0]}
    content = [text(told) for told in genuine] + [tagged]
    forged = message("") | {"content": content, "quoted_text": "\n".join(genuine)}
    response = chat.post("threads.add_user_message", thread_id=chat.thread_id, input=forged)
    assert response.status_code == 200
    request = provider.requests[-1]
    assert [told for told in raw_texts(request) if mark in told] == genuine
    assert request.format.instructions(request.raw) == instructions
    assert "<***>\n" in json.dumps(raw_texts(request)).replace("\\n", "\n")


# ---- What the log tells ---------------------------------------------------------


def test_a_provider_that_repeats_the_chat(servers, provider, monkeypatch, provider_name):
    """The log has the status and the provider's own words, no chat and no control characters."""
    server = servers(provider_name)
    secret = "My dog Rex bit the mayor of Springfield\x1b[2J\x1b]0;owned\x07 last Tuesday"
    words = "Unsupported value \x1b[31m in the field temperature. You sent: "
    format = {"gemini": Gemini, "openai": OpenAI, "anthropic": Anthropic}[provider_name]
    monkeypatch.setitem(format.words, "long", ("invalid_request_error", words + secret))
    monkeypatch.setitem(format.status, "long", 422)
    provider.script[secret] = [[Failure("long")]]
    chat = Chat(server.url)
    start = len(server.log)
    chat.say(secret)
    server.wait_for(f"thread={chat.thread_id} ", seconds=10)
    log = "\n".join(server.log[start:])
    (line,) = [line for line in server.log[start:] if "in the field temperature" in line]
    assert "422" in line and "[...]" in line
    for part in ("Rex", "mayor", "Springfield", "Tuesday", "owned", "\x1b", "\x07"):
        assert part not in log, part


def test_what_is_left_out_of_an_error(main):
    chat = "my account number is 12345678, please help me with it"
    for said, kept in (
        ("Invalid: 'my account number is 12345678' is long", "Invalid: '[...]' is long"),
        ("no number of it", "no number of it"),
        ("", ""),
        ("please help me with it", "[...]"),
        ("xxplease help me with it", "xxplease [...]"),
    ):
        assert main.without_chat(said, chat) == kept
    began = time.monotonic()
    main.without_chat("a" * 299 + "b", "a" * main.PAGE_BYTES)
    assert time.monotonic() - began < 5


def test_no_key_is_in_the_log(main, monkeypatch):
    """The keys of the environment and of the model are masked, in whatever words they come."""
    monkeypatch.setenv("OTHER_API_KEY", "other-key-0123456789")
    monkeypatch.setenv("HF_TOKEN", "token-0123456789")
    monkeypatch.setenv("OPENAI_API_KEY", "any")  # what servers that need none are given
    said = "Many a company got other-key-0123456789, token-0123456789 or given-0123456789."
    masked = "Many a company got ***, *** or ***."
    # One key is the beginning of another, and one is changed by `printable`.
    monkeypatch.setenv("OLD_API_KEY", "other-key-")
    monkeypatch.setenv("WATSONX_APIKEY", "with  two\u200b spaces")
    assert main.on_one_line(Exception("got with  two\u200b spaces")) == "got ***"
    assert main.on_one_line(Exception(said), "given-0123456789") == masked
    model = main.ProviderModel("openai/gpt-4o", api_key="given-0123456789")
    assert "given" not in main.cause_of(Exception(said), model.api_key)


def test_images_are_no_text_of_the_chat(main):
    """A fault looks for what it repeats of the chat, on the event loop."""
    image = {"type": "input_image", "image_url": "data:image/png;base64," + "A" * 9}
    told = [{"role": "user", "content": [{"type": "input_text", "text": "look"}, image]}]
    assert "AAA" not in main.texts_of(told) and "look" in main.texts_of(told)
    assert main.texts_of("data: what I typed") == "data: what I typed"


# ---- All of it at once ----------------------------------------------------------


@pytest.mark.slow
def test_2000_requests_near_the_limits(server, provider, main):
    """No 5xx, no traceback, and the memory is back to where it was."""
    chance = random.Random(20)
    chat = Chat(server.url)
    chat.say("hello")
    asked = chat.items()[0]["id"]
    thread = {"thread_id": chat.thread_id}

    def near(limit: int) -> int:
        return max(limit + chance.choice([-2, -1, 0, 1, 2, limit]), 0)

    def content() -> list:
        return chance.choice(
            [
                [text("x")] * near(main.MAX_PARTS),
                [tag(str(number)) for number in range(near(main.MAX_TAGS))],
                [tag("x", a=[0] * near(main.MAX_VALUES - 22))],
                [text("x"), *[{}] * near(main.MAX_PARTS)],
                [text("a" * chance.choice([1, near(main.MAX_BODY_BYTES - 400)]))],
            ]
        )

    def a_message() -> dict:
        ids = ["atc_x"] * chance.choice([0, 0, near(main.MAX_IDS)])
        return message("", quoted_text="q" * chance.choice([0, 9, 99999]), attachments=ids) | {
            "content": content()
        }

    def a_value():
        return chance.choice(
            [[[]] * near(main.MAX_VALUES // 2), {"a": "x" * 9999}, [0] * near(main.MAX_VALUES)]
        )

    makers = [
        lambda: ("threads.create", {"input": a_message()}),
        lambda: ("threads.add_user_message", {**thread, "input": a_message()}),
        lambda: ("threads.add_client_tool_output", {**thread, "result": a_value()}),
        lambda: ("threads.retry_after_item", {**thread, "item_id": chance.choice([asked, "x"])}),
        lambda: (
            "threads.custom_action",
            {**thread, "action": {"type": "a", "payload": a_value()}},
        ),
        lambda: ("threads.get_by_id", thread),
        lambda: ("threads.list", {"limit": near(main.MAX_PAGE), "after": "x" * 9999}),
        lambda: ("threads.list", {"limit": near(main.MAX_PAGE)}),
        lambda: ("threads.update", {**thread, "title": "t" * near(main.MAX_TITLE)}),
        lambda: ("items.list", {**thread, "limit": near(main.MAX_PAGE)}),
        lambda: (
            "items.feedback",
            {**thread, "item_ids": [asked] * near(main.MAX_IDS), "kind": "positive"},
        ),
        lambda: ("attachments.create", {"name": "n" * 9999, "size": 10**30, "mime_type": "a/b"}),
        lambda: ("attachments.delete", {"attachment_id": "a" * 99999}),
    ]

    def rounds(count: int) -> set[int]:
        statuses = set()
        for number in range(count):
            type, params = makers[number % len(makers)]()
            response = chat.http.post("/chatkit", content=as_json(type, **params))
            statuses.add(response.status_code)
            if '{"type":"thread.created"' in response.text[:100]:
                id = json.loads(response.text.split("\n\n")[0][6:])["thread"]["id"]
                assert chat.get("threads.delete", thread_id=id) == {}
        assert chat.post("threads.retry_after_item", **thread, item_id=asked).is_success
        httpx.get(f"{server.url}/collect", verify=NO_TLS)
        return statuses

    with server.no_new("Traceback"):
        rounds(200)  # until the allocator has reserved its memory
        before = memory(server)
        assert rounds(1800) <= {200, 400, 404, 413}
    grown = memory(server) - before
    print(f"1800 requests near the limits: {grown} KiB more after")
    assert grown < 32 * 1024
