"""The recipes in tests/examples/, each run in main.py's place, with each provider."""

import json
import re
import shlex
import sys
import time
from pathlib import Path

import httpx
import jwt
import pytest
from chatkit.widgets import WidgetRoot
from pydantic import TypeAdapter

from client import EXAMPLES, NO_TLS, SUPPORT, Chat, Server, done, error_of, text_of, until
from provider import Failure, Pause, Silence, Text, Thought, ToolCall

TOKENS = "alice:token-of-alice,bob:token-of-bob"


def without_ids(value):
    """A JSON value without what differs from run to run: ids and times."""
    if isinstance(value, dict):
        return {
            name: without_ids(part)
            for name, part in value.items()
            if name not in ("id", "thread_id", "created_at", "item_id", "call_id")
        }
    return [without_ids(part) for part in value] if isinstance(value, list) else value


def shown(events: list) -> list[dict]:
    """The events of a turn after the user's message, but for the deltas of the reply."""
    found = [without_ids(json.loads(event.model_dump_json(exclude_none=True))) for event in events]
    return [
        event
        for event in found
        if event["type"] not in ("thread.created", "thread.updated", "stream_options")
        and event.get("item", {}).get("type") not in ("user_message", "assistant_message")
        and not event.get("update", {}).get("type", "").startswith("assistant_message")
    ]


def told(provider, number: int = -1) -> list[tuple[str, str]]:
    """What the model was told, with the ids of tool calls and items left out."""
    ids = r"\b(call|toolu|msg|thr)_[0-9a-f]+\b"
    messages = provider.requests[number].messages
    return [(role, re.sub(ids, "ID", text)) for role, text in messages]


def tool_pair(
    provider_name: str, tool: str, arguments: dict, output: str, signature: str = "c2ln"
) -> list[tuple[str, str]]:
    """A tool call and its output in the provider's form; `signature` is Gemini's of the call."""
    text = json.dumps(arguments)
    is_object = output.startswith("{")
    pairs: dict[str, tuple[dict, dict]] = {
        "gemini": (
            {
                "function_call": {"name": tool, "args": arguments, "id": "ID"},
                "thoughtSignature": signature,
            },
            {
                "function_response": {
                    "name": tool,
                    "response": json.loads(output) if is_object else {"content": output},
                    "id": "ID",
                }
            },
        ),
        "openai": (
            {
                "role": "assistant",
                "tool_calls": [
                    {"function": {"arguments": text, "name": tool}, "id": "ID", "type": "function"}
                ],
            },
            {"role": "tool", "content": output, "tool_call_id": "ID"},
        ),
        "anthropic": (
            {"type": "tool_use", "name": tool, "input": arguments, "id": "ID"},
            {"type": "tool_result", "content": output, "tool_use_id": "ID"},
        ),
    }
    return [("tool", json.dumps(part, sort_keys=True)) for part in pairs[provider_name]]


def reply(text: str) -> dict:
    content = [{"annotations": [], "text": text, "type": "output_text"}]
    return {"type": "assistant_message", "content": content}


def pasted(recipe: str) -> str:
    """A recipe as the README says to paste it."""
    without_imports = re.sub(r"^import main\n", "", recipe, flags=re.M)
    return re.sub(r"\bmain\.", "", without_imports.split("if __name__ ==")[0])


def test_all_recipes_pasted_into_main(tmp_path, provider):
    """No name of a recipe hides one of main.py's, or one of another recipe's.

    None takes away what another one has added.
    """
    start = "# ---- Start -"
    recipes = [path for path in EXAMPLES.glob("*.py") if not path.stem.endswith("_store")]
    code = "".join(pasted(path.read_text()) for path in sorted(recipes))
    command = shlex.join([sys.executable, str(SUPPORT / "mcp_server.py")])
    environment = {**provider.environment(), "MCP_SERVER": command, **LOGIN}
    environment |= {"PROVIDER": "openai", "MODEL": "gpt-5"}
    server = Server(tmp_path, environment, fork=True, changes={start: f"{code}\n{start}"})
    chat = Chat(server.started().url)
    chat.http.headers.update(cookie())
    provider.script["hello"] = [[Text("See [1].")]]
    (reply,) = done(chat.say("hello"))
    assert len(reply.content[0].annotations) == 1
    (request,) = [request for request in provider.requests if request.message == "hello"]
    tools = {tool["function"]["name"] for tool in request.body["tools"]}
    assert tools >= {"find_table", "local_time", "search", "weather", "transfer_to_billing"}
    widget = {"thread_id": chat.thread_id, "action": {"type": "cook"}}
    assert chat.post("threads.custom_action", **widget).is_success
    assert chat.http.get("/chatkit").status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in "\n".join(server.log)


# ---- A tool with a widget -----------------------------------------------------------------------


WIDGET: TypeAdapter[WidgetRoot] = TypeAdapter(WidgetRoot)


def card(*children: dict) -> dict:
    """The item of a card, with what the release of chatkit adds to its parts."""
    widget = WIDGET.validate_python({"type": "Card", "children": list(children)})
    return {"type": "widget", "widget": json.loads(widget.model_dump_json(exclude_none=True))}


@pytest.mark.filterwarnings("ignore:Direct usage of named:DeprecationWarning")
def test_a_widget_with_a_button(recipe, provider, provider_name):
    chat = Chat(recipe("widget", provider_name).url)
    provider.script["four of us"] = [
        [ToolCall("find_table", {"guests": 4})],
        [Text("Here is one.")],
    ]
    click = {"type": "book", "payload": {"guests": 4}}
    text = {"type": "Text", "value": "A table for 4"}
    offer = card(text, {"type": "Button", "label": "Book", "onClickAction": click})
    booked = card(text, {"type": "Caption", "value": "Booked"})

    assert shown(chat.say("four of us")) == [
        {"type": "progress_update", "text": "Looking for a table…"},
        {"type": "thread.item.done", "item": offer},
    ]
    output = "The user sees the table and a button that books it."
    pair = tool_pair(provider_name, "find_table", {"guests": 4}, output)
    assert told(provider) == [("user", "four of us"), *pair]
    widget = chat.items()[1]
    assert [without_ids(item) for item in chat.items()[1:]] == [offer, reply("Here is one.")]

    def clicked(action: dict) -> list:
        sender = {"thread_id": chat.thread_id, "item_id": widget["id"]}
        return list(chat.stream("threads.custom_action", **sender, action=action))

    assert shown(clicked({"type": "cook", "payload": {}})) == []
    assert error_of(clicked({"type": "book", "payload": {"guests": 1000}})).code == "stream.error"
    assert chat.items()[1] == widget
    events = clicked(click)
    assert shown(events) == [{"type": "thread.item.replaced", "item": booked}]
    assert events[-1].item.id == widget["id"]
    assert [without_ids(item) for item in chat.items()[1:]] == [booked, reply("Here is one.")]

    chat.say("thanks")
    texts = [text for _, text in told(provider)]
    assert [text for text in texts if "Booked" in text] == [
        "The following graphical UI widget (id: ID) was displayed to the user:"
        + json.dumps(booked["widget"], separators=(",", ":"))
    ]
    assert [text for text in texts if "The user booked" in text] == [
        "Hidden context for the agent (not shown to the user):\n"
        "<HiddenContext>\nThe user booked the table for 4.\n</HiddenContext>"
    ]


# ---- A tool in the browser ----------------------------------------------------------------------


def test_a_client_tool(recipe, provider, provider_name):
    chat = Chat(recipe("client_tool", provider_name).url)
    provider.script["what time is it?"] = [[ToolCall("local_time")], [Text("Noon.")]]
    call = {"type": "client_tool_call", "name": "local_time", "arguments": {}}
    assert shown(chat.say("what time is it?")) == [
        {"type": "thread.item.done", "item": {**call, "status": "pending"}}
    ]
    time_there = {"time": "12:00"}
    answer = {"thread_id": chat.thread_id, "result": time_there}
    (item,) = done(list(chat.stream("threads.add_client_tool_output", **answer)))
    assert text_of(item) == "Noon."
    signature = "skip_thought_signature_validator"
    pair = tool_pair(provider_name, "local_time", {}, json.dumps(time_there), signature)
    assert told(provider) == [("user", "what time is it?"), *pair]
    assert [without_ids(item) for item in chat.items()[1:]] == [
        {**call, "status": "completed", "output": time_there},
        reply("Noon."),
    ]


# ---- Images -------------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\nthe rest"
ENCODED = "iVBORw0KGgp0aGUgcmVzdA=="
IMAGE_PARTS = {
    "gemini": {"inline_data": {"data": ENCODED, "mime_type": "image/png"}},
    "openai": {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{ENCODED}", "detail": "auto"},
    },
    "anthropic": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": ENCODED},
    },
}


def upload(chat: Chat, content: bytes = PNG, field: str = "file") -> httpx.Response:
    return chat.http.post("/images", files={field: ("a cat.png", content, "image/png")})


def test_an_image_is_kept_shown_and_told(recipe, provider, provider_name, tmp_path):
    server = recipe("images", provider_name)
    chat = Chat(server.url)
    image = upload(chat).json()
    kept = tmp_path / "images" / "images" / f"{image['id']}.png"
    assert re.fullmatch("atc_[0-9a-f]{32}", image["id"])
    address = f"{str(chat.http.base_url).rstrip('/')}/images/{image['id']}.png"
    known = {key: value for key, value in image.items() if value is not None}
    assert known == {
        "id": image["id"],
        "type": "image",
        "name": "a cat.png",
        "mime_type": "image/png",
        "preview_url": address,
    }
    assert kept.read_bytes() == PNG
    preview = chat.http.get(address)
    assert (preview.content, preview.headers["content-type"]) == (PNG, "image/png")

    chat.say("what is it?", attachments=[image["id"]])
    picture = ("tool", json.dumps(IMAGE_PARTS[provider_name], sort_keys=True))
    assert told(provider) == [("user", "what is it?"), picture]
    (attachment,) = chat.items()[0]["attachments"]
    attachment.pop("thread_id", None)  # chatkit 1.6 adds it
    assert attachment == known
    chat.say("and now?")
    assert told(provider) == [
        ("user", "what is it?"),
        picture,
        ("assistant", "You said: what is it?"),
        ("user", "and now?"),
    ]

    chat.get("attachments.delete", attachment_id=image["id"])
    assert not kept.exists()
    assert chat.http.get(address).status_code == 404
    chat.say("still there?")
    assert told(provider)[:2] == [
        ("user", "what is it?"),
        ("user", "The image a cat.png was deleted."),
    ]


@pytest.mark.parametrize("provider_name", ["openai"])
def test_images_that_are_refused(recipe, provider, provider_name, tmp_path):
    at = "https://chat.example/prefix/images"
    server = recipe("images", provider_name, CHATKIT_TOKENS=TOKENS, IMAGES_URL=at)
    alice, bob = Chat(server.url, "token-of-alice"), Chat(server.url, "token-of-bob")
    refused = {
        413: upload(alice, PNG + bytes(5 * 1024 * 1024)),
        415: upload(alice, b"<script>"),
        400: upload(alice, field="picture"),
        401: upload(Chat(server.url)),
    }
    assert {status: response.status_code for status, response in refused.items()} == {
        status: status for status in refused
    }
    assert [refused[status].json()["detail"] for status in (413, 415, 400)] == [
        "An image may have 4194304 bytes.",
        "Only PNG and JPEG images can be sent.",
        "The form has no file.",
    ]
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    unbounded = alice.http.post("/images", headers=form, content=iter([b"--b\r\n"]))
    assert unbounded.status_code == 413
    two_phases = {"name": "a cat.png", "size": 1, "mime_type": "image/png"}
    assert alice.post("attachments.create", **two_phases).status_code == 400
    assert list((tmp_path / "images" / "images").iterdir()) == []

    image = upload(alice).json()
    assert image["preview_url"] == f"{at}/{image['id']}.png"
    message = {"content": [], "attachments": [image["id"]], "inference_options": {}}
    for response in (
        bob.post("threads.create", input=message),
        bob.post("attachments.delete", attachment_id=image["id"]),
    ):
        assert response.status_code == 404
        assert response.json() == {"detail": f"Attachment {image['id']} not found"}
    assert [path.read_bytes() for path in (tmp_path / "images" / "images").iterdir()] == [PNG]
    assert provider.requests == []


# ---- Thoughts and sources -----------------------------------------------------------------------


def test_thoughts_are_shown(recipe, provider, provider_name):
    model = {"openai": "gpt-5"}.get(provider_name, "auto")
    chat = Chat(recipe("thoughts", provider_name, MODEL=model).url)
    provider.script["think"] = [[Thought("Let me "), Thought("think."), Text("Yes.")]]
    chat.say("think")
    body = provider.requests[0].body
    asked_for = {
        "gemini": lambda: body["generationConfig"]["thinkingConfig"],
        "openai": lambda: body["reasoning_effort"],
        "anthropic": lambda: (body["thinking"], body["output_config"]),
    }
    assert (
        asked_for[provider_name]()
        == {
            "gemini": {"thinkingLevel": "low", "includeThoughts": True},
            "openai": "low",
            "anthropic": ({"type": "adaptive", "display": "summarized"}, {"effort": "low"}),
        }[provider_name]
    )
    thought = {"type": "thought", "content": "Let me think.", "status_indicator": "none"}
    workflow = {
        "type": "reasoning",
        "tasks": [thought],
        "summary": {"duration": 0},
        "expanded": False,
    }
    assert [without_ids(item) for item in chat.items()[1:]] == [
        {"type": "workflow", "workflow": workflow},
        reply("Yes."),
    ]


def test_sources_are_shown(recipe, provider, provider_name):
    chat = Chat(recipe("sources", provider_name).url)
    provider.script["returns?"] = [
        [ToolCall("search", {"query": "returned"})],
        [Text("Within 30 days [1]"), Text(", see [7].")],
    ]
    (item,) = done(chat.say("returns?"))
    source = {"type": "url", "title": "Returns", "url": "https://shop.example/returns"}
    text = "Within 30 days [1], see [7]."
    annotations = [{"type": "annotation", "source": source, "index": len("Within 30 days [1]")}]
    content = [{"type": "output_text", "text": text, "annotations": annotations}]
    assert item.model_dump(exclude_none=True)["content"] == content
    assert chat.items()[1]["content"] == content
    found = "[1] Returns: Goods can be returned within 30 days."
    pair = tool_pair(provider_name, "search", {"query": "returned"}, found)
    assert told(provider) == [("user", "returns?"), *pair]
    chat.say("thanks")
    assert ("assistant", text) in told(provider)


# ---- Other models, agents and tools ------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider_name", "other"),
    [
        ("gemini", "openai/gpt-4o-mini"),
        ("openai", "anthropic/claude-sonnet-4-6"),
        ("anthropic", "gemini/gemini-flash-latest"),
    ],
)
def test_a_model_picker(recipe, provider, provider_name, other):
    server = recipe("model_picker", provider_name, MODELS=other)
    chat = Chat(server.url)
    page = chat.http.get("/chatkit").text
    options = json.loads(re.search(r"const options = (.*);", page)[1])
    default, second = options["composer"]["models"]
    assert default["id"].startswith(f"{provider_name}/")
    assert default["id"].endswith(default["label"])
    assert second == {"id": other, "label": other.partition("/")[2]}
    for choice in (default["id"], other):
        chat.say("hello", inference_options={"model": choice})
        kind, _, model = choice.partition("/")
        request = provider.requests[-1]
        assert request.format.__name__.lower() == kind
        assert request.body.get("model") == model or f"/models/{model}:" in request.path


def instructions(provider) -> list[str]:
    """The instructions of each request."""
    return [seen.format.instructions(seen.body) for seen in provider.requests]


def test_a_hand_off(recipe, provider, provider_name, main):
    chat = Chat(recipe("hand_off", provider_name).url)
    provider.script["my invoice is wrong"] = [
        [Text("One moment. "), ToolCall("transfer_to_billing")],
        [Text("Which number has it?")],
    ]
    items = done(chat.say("my invoice is wrong"))
    assert [text_of(item) for item in items] == ["One moment. ", "Which number has it?"]
    assert [without_ids(item) for item in chat.items()[1:]] == [
        reply("One moment. "),
        reply("Which number has it?"),
    ]
    assert instructions(provider) == [
        main.INSTRUCTIONS,
        "You answer questions about invoices. Ask for the invoice's number first.",
    ]
    pair = tool_pair(provider_name, "transfer_to_billing", {}, '{"assistant": "Billing"}')
    assert told(provider)[-1] == pair[-1]
    chat.say("the number is 7")  # who took over goes on
    assert instructions(provider)[1] == instructions(provider)[2]


@pytest.mark.slow
def test_the_tools_of_an_mcp_server(recipe, provider, provider_name):
    command = [sys.executable, str(SUPPORT / "mcp_server.py")]
    server = recipe("mcp_tools", provider_name, MCP_SERVER=shlex.join(command))
    chat = Chat(server.url)
    provider.script["rain?"] = [[ToolCall("weather", {"city": "Rome"})], [Text("It does.")]]
    assert [text_of(item) for item in done(chat.say("rain?"))] == ["It does."]
    call, output = tool_pair(provider_name, "weather", {"city": "Rome"}, "It rains in Rome.")
    if provider_name != "gemini":
        parts = json.dumps([{"text": "It rains in Rome.", "type": "text"}])
        output = ("tool", output[1].replace('"It rains in Rome."', parts))
    assert told(provider) == [("user", "rain?"), call, output]
    assert f"PROVIDER={provider_name}, model" in "\n".join(server.log)  # main.py's own start
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    server.stop()
    assert not Path(f"/proc/{child}").exists()


# ---- A login ------------------------------------------------------------------------------------

SECRET = "0123456789abcdef0123456789abcdef"
LOGIN = {"SESSION_SECRET": SECRET, "ALLOWED_ORIGINS": "https://shop.example"}


def cookie(secret: str = SECRET, algorithm: str = "HS256", **claims) -> dict[str, str]:
    claims = {"sub": "alice", "exp": time.time() + 60, **claims}
    claims = {name: value for name, value in claims.items() if value is not None}
    return {"Cookie": "session=" + jwt.encode(claims, secret, algorithm)}


def test_a_login_by_cookie(recipe, provider, provider_name):
    server = recipe("login", provider_name, **LOGIN)
    alice, bob = Chat(server.url), Chat(server.url)
    alice.http.headers.update(cookie())
    bob.http.headers.update(cookie(sub="bob"))
    assert [text_of(item) for item in done(alice.say("hello"))] == ["You said: hello"]
    assert [thread["title"] for thread in alice.get("threads.list")["data"]] == ["hello"]
    assert bob.get("threads.list")["data"] == []
    assert bob.post("threads.get_by_id", thread_id=alice.thread_id).status_code == 404

    for headers in (
        {},
        {"Cookie": "session=nonsense"},
        {"Authorization": cookie()["Cookie"].replace("session=", "Bearer ")},
        cookie(secret="f" * 32),
        cookie(secret="", algorithm="none"),
        cookie(exp=time.time() - 60),
        cookie(exp=None),
        cookie(sub=None),
    ):
        for method, path in (("POST", "/chatkit"), ("GET", "/debug/threads")):
            body = {"type": "threads.list", "params": {}}
            url = f"{server.url}{path}"
            response = httpx.request(method, url, headers=headers, json=body, verify=NO_TLS)
            assert (response.status_code, response.json()) == (401, {"detail": "Please log in."})
            assert "www-authenticate" not in response.headers


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({**LOGIN, "ALLOWED_ORIGINS": "*"}, "With ALLOWED_ORIGINS=* any web page could"),
        ({**LOGIN, "SESSION_SECRET": "short"}, "SESSION_SECRET needs 32 characters"),
    ],
)
def test_a_login_that_is_not_safe_does_not_start(tmp_path, environment, says):
    environment = {"PROVIDER": "mock", **environment}
    server = Server(tmp_path, environment, EXAMPLES / "login.py", fork=True)
    assert server.process.wait(60) == 1
    server.reader.join(10)
    assert len(server.log) == 2
    assert server.log[0].startswith(says)
    assert server.log[1] == "(end of log)"


# ---- Titles -------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_title_by_the_model(recipe, provider, provider_name):
    server = recipe("titles", provider_name)

    def title(chat: Chat) -> str:
        return chat.get("threads.get_by_id", thread_id=chat.thread_id)["title"]

    def script(words: str, *steps) -> None:
        provider.script[f"The chat starts with: {words}"] = [list(steps)]

    # The title is there while the reply streams: the client is told.
    script("hello", Text(" A greeting\n"))
    slowly = [step for _ in range(200) for step in (Pause(0.02), Text("."))]
    provider.script["hello"] = [[Text("Hi"), *slowly]]
    early, titles = Chat(server.url), []
    for event in early.start("hello"):
        if event.type == "thread.updated":
            titles.append(event.thread.title)
        if len(titles) == 2:
            break
    assert titles == ["hello", "A greeting"]
    assert title(early) == "A greeting"
    (asked,) = [seen for seen in provider.requests if seen.message != "hello"]
    assert asked.messages == [("user", "The chat starts with: hello")]
    assert asked.format.instructions(asked.body) == (
        "Write a title of at most five words for a chat that starts as follows."
    )

    # The turn does not wait for it.
    def unanswered(words: str) -> tuple[Chat, Silence]:
        """A chat whose turn is over, and what its title waits for."""
        silence, chat = Silence(), Chat(server.url)
        script(words, silence, Text("A number"))
        assert [text_of(item) for item in done(chat.say(words))] == [f"You said: {words}"]
        assert title(chat) == words
        return chat, silence

    renamed, silence = unanswered("one")
    renamed.get("threads.update", thread_id=renamed.thread_id, title="mine")
    silence.end.set()
    late, silence = unanswered("two")
    silence.end.set()
    await until(lambda: title(late) == "A number")
    assert title(renamed) == "mine"  # what the user wrote meanwhile stays

    # A fault leaves the first words.
    script("three", Failure("server"))
    failed = Chat(server.url)
    assert [text_of(item) for item in done(failed.say("three"))] == ["You said: three"]
    log = server.wait_for(f"No title for {failed.thread_id}")
    assert title(failed) == "three"
    assert "Traceback" not in log
    # The second message of a thread asks for none.
    provider.requests.clear()
    failed.say("four")
    assert [seen.message for seen in provider.requests] == ["four"]
