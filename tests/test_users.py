"""CHATKIT_TOKENS: who is asking, and that they see their own threads only. And another Store."""

import httpx
import pytest

from client import NO_TLS, Chat, done, message, text_of
from conftest import USERS
from provider import ToolCall


@pytest.fixture(scope="module")
def server(servers):
    return servers("users")


@pytest.fixture
def alice(server):
    return Chat(server.url, USERS["alice"])


@pytest.fixture
def bob(server):
    return Chat(server.url, USERS["bob"])


@pytest.mark.parametrize(
    "header",
    [
        *[None, "", "Bearer", "Bearer nobody", "token-of-alice"],
        *["Basic token-of-alice", "Bearer token-of-alic", "Bearer \u00fc"],
    ],
)
def test_no_valid_token(server, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    body = {"type": "threads.list", "params": {}}
    for response in (
        httpx.post(f"{server.url}/chatkit", verify=NO_TLS, json=body, headers=headers),
        httpx.get(f"{server.url}/debug/threads", verify=NO_TLS, headers=headers),
    ):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert "token" in response.json()["detail"]
    assert not [token for token in USERS.values() if token in "\n".join(server.log)]


def test_what_stays_open(server):
    assert httpx.get(f"{server.url}/health", verify=NO_TLS).json() == {"status": "ok"}
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
        preflight = httpx.options(
            f"{server.url}/chatkit",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization",
            },
        )
        assert preflight.status_code == (200 if allowed else 400)
        assert preflight.headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_each_user_has_a_conversation_of_their_own(alice, bob, provider):
    for chat in (alice, bob):
        for text in ("one", "two"):
            assert [text_of(item) for item in done(chat.say(text))] == [f"You said: {text}"]
    for chat, other in ((alice, bob), (bob, alice)):
        listed = [thread["id"] for thread in chat.get("threads.list")["data"]]
        assert chat.thread_id in listed and other.thread_id not in listed
        debug = chat.http.get("/debug/threads").json()
        assert chat.thread_id in debug and other.thread_id not in debug


def test_every_operation_as_the_wrong_user(alice, bob, provider):
    """All say 404, and alice's thread is as it was."""
    provider.script["colour"] = [[ToolCall("pick_colour", {"hint": "warm"})]]
    alice.say("hello")
    alice.say("colour")
    asked, reply = alice.items()[:2]
    thread = {"thread_id": alice.thread_id}
    before = alice.debug(), alice.get("threads.get_by_id", **thread)
    operations = {
        "threads.get_by_id": thread,
        "threads.update": {**thread, "title": "stolen"},
        "threads.delete": thread,
        "threads.list": {"after": alice.thread_id},
        "items.list": thread,
        "items.feedback": {**thread, "item_ids": [reply["id"]], "kind": "positive"},
        "threads.add_user_message": {**thread, "input": message("let me in")},
        "threads.add_client_tool_output": {**thread, "result": "red"},
        "threads.retry_after_item": {**thread, "item_id": asked["id"]},
    }
    bob.say("mine")
    for type, params in operations.items():
        response = bob.post(type, **params)
        assert (response.status_code, "not found" in response.text) == (404, True), type
        assert "hello" not in response.text
    for type in ("threads.custom_action", "attachments.create", "attachments.delete"):
        params = {
            **thread,
            "action": {"type": "a"},
            "name": "a",
            "size": 1,
            "mime_type": "x/y",
            "attachment_id": "a",
        }
        assert bob.post(type, **params).status_code in (400, 404), type
    # An item of alice's under a thread of bob's own.
    theirs = {"thread_id": bob.thread_id, "item_id": asked["id"]}
    assert bob.post("threads.retry_after_item", **theirs).status_code == 404
    assert (alice.debug(), alice.get("threads.get_by_id", **thread)) == before


def test_a_chat_on_another_store(servers, provider):
    """The same conversation on SQLite, and still there for a second server on the same file."""
    chat = None
    for name in ("sqlite_1", "sqlite_2"):
        chat = Chat(servers(name).url, thread_id=chat and chat.thread_id)
        for text in ("one", "two"):
            chat.say(f"{text} on {name}")
    texts = [text_of(item) for item in chat.items()]
    said = [f"{text} on {name}" for name in ("sqlite_1", "sqlite_2") for text in ("one", "two")]
    assert texts == [line for text in said for line in (text, f"You said: {text}")]
    assert provider.requests[-1].messages[0] == ("user", "one on sqlite_1")
    assert chat.get("threads.list")["data"][0]["title"] == "one on sqlite_1"
