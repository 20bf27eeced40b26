"""The recipes in tests/examples/, each run where it stands, with each provider.

What does not depend on the provider's wire is tested with one.
"""

import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import httpx
import jwt
import pytest
from chatkit.widgets import WidgetRoot
from pydantic import TypeAdapter

from client import (
    EXAMPLES,
    SUPPORT,
    Chat,
    Server,
    changed,
    done,
    error_of,
    message,
    say_at_once,
    text_of,
    until,
)
from provider import Failure, Pause, Silence, Text, Thought, ToolCall

TOKENS = "alice:token-of-alice,bob:token-of-bob"
one_provider = pytest.mark.parametrize("provider_name", ["openai"])


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
    ids = r'(?<=id": ")\w+|\b(call|toolu|msg|thr)_[0-9a-f]+\b'
    return [(role, re.sub(ids, "ID", text)) for role, text in provider.requests[number].messages]


def tool_pair(provider_name: str, tool: str, arguments: dict, output: str, signature: str = "c2ln"):
    """A tool call and its output in the provider's form; `signature` is Gemini's of the call."""
    function = {"arguments": json.dumps(arguments), "name": tool}
    result = json.loads(output) if output.startswith("{") else {"content": output}
    call = {"function_call": {"name": tool, "args": arguments, "id": "ID"}}
    pairs: dict[str, list[dict]] = {
        "gemini": [
            {**call, "thoughtSignature": signature},
            {"function_response": {"name": tool, "response": result, "id": "ID"}},
        ],
        "openai": [
            {
                "role": "assistant",
                "tool_calls": [{"function": function, "id": "ID", "type": "function"}],
            },
            {"role": "tool", "content": output, "tool_call_id": "ID"},
        ],
        "anthropic": [
            {"type": "tool_use", "name": tool, "input": arguments, "id": "ID"},
            {"type": "tool_result", "content": output, "tool_use_id": "ID"},
        ],
    }
    return [("tool", json.dumps(part, sort_keys=True)) for part in pairs[provider_name]]


def reply(text: str) -> dict:
    content = [{"annotations": [], "text": text, "type": "output_text"}]
    return {"type": "assistant_message", "content": content}


def texts(events: list) -> list[str]:
    return [text_of(item) for item in done(events)]


def instructions(provider) -> list[str]:
    """The instructions of each request."""
    return [seen.format.instructions(seen.body) for seen in provider.requests]


def file_with(*recipes: str, more: str = "") -> str:
    """A file of one's own with several recipes."""
    return f"import main, {', '.join(recipes)}\n{more}\nmain.serve()"


@one_provider
def test_all_recipes_in_one_file(recipe, provider, provider_name):
    """None takes away what another one has added."""
    names = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "postgres_store")
    server = recipe(
        "all", provider_name, file_with(*names), MODEL="gpt-5", MODELS="gpt-4o", **LOGIN, **rainy()
    )
    chat = Chat(server.url)
    chat.http.headers.update(cookie())
    provider.script["hello"] = [[Text("See [1].")]]
    (item,) = done(chat.say("hello", inference_options={"model": "gpt-4o"}))
    assert len(item.content[0].annotations) == 1
    (request,) = [request for request in provider.requests if request.message == "hello"]
    tools = {tool["function"]["name"] for tool in request.body["tools"]}
    added = {"find_table", "local_time", "search", "mcp_server__weather", "transfer_to_billing"}
    assert (request.body["model"], tools & added) == ("gpt-4o", added)
    widget = {"thread_id": chat.thread_id, "action": {"type": "cook"}}
    assert chat.post("threads.custom_action", **widget).is_success
    assert upload(chat).status_code == 200
    assert "Traceback" not in "\n".join(server.log)


@pytest.mark.slow
def test_no_recipe_imports_litellm_before_main():
    """main.py sets the environment that LiteLLM reads when it is imported."""
    before = [path.read_text().split("\nimport main\n")[0] for path in EXAMPLES.glob("*.py")]
    code = "\n".join([*before, "import sys", "sys.exit('litellm' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- A tool with a widget -----------------------------------------------------------------------


WIDGET: TypeAdapter[WidgetRoot] = TypeAdapter(WidgetRoot)


def card(*children: dict) -> dict:
    """The item of a card, with what the release of chatkit adds to its parts."""
    widget = WIDGET.validate_python({"type": "Card", "children": list(children)})
    return {"type": "widget", "widget": json.loads(widget.model_dump_json(exclude_none=True))}


def test_a_widget_with_a_button(recipe, provider, provider_name):
    chat = Chat(recipe("widget", provider_name).url)
    calls = [ToolCall("find_table", {"guests": 4})]
    provider.script["four of us"] = [calls, [Text("Here is one.")]]
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
    said = " ".join(text for _, text in told(provider))
    graphic = json.dumps(booked["widget"], separators=(",", ":"))
    assert said.count(f"widget (id: ID) was displayed to the user:{graphic}") == 1
    note = "<HiddenContext>\nThe user booked the table for 4.\n</HiddenContext>"
    assert said.count(note) == 1


# ---- A tool in the browser ----------------------------------------------------------------------


def test_a_client_tool(recipe, provider, provider_name):
    chat = Chat(recipe("client_tool", provider_name).url)
    provider.script["what time is it?"] = [[ToolCall("local_time")], [Text("Noon.")]]
    call = {"type": "client_tool_call", "name": "local_time", "arguments": {}}
    assert shown(chat.say("what time is it?")) == [
        {"type": "thread.item.done", "item": {**call, "status": "pending"}}
    ]
    time_there = {"time": "12:00"}
    assert texts(chat.answer(time_there)) == ["Noon."]
    signature = "skip_thought_signature_validator"
    pair = tool_pair(provider_name, "local_time", {}, json.dumps(time_there), signature)
    assert told(provider) == [("user", "what time is it?"), *pair]
    assert [without_ids(item) for item in chat.items()[1:]] == [
        {**call, "status": "completed", "output": time_there},
        reply("Noon."),
    ]


# ---- Images -------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"rest"


def jpeg(width: int, height: int) -> bytes:
    """A comment, a byte that only fills, a table, and the frame with the size."""
    comment, table = b"\xff\xfe\0\4\xff\xc0", b"\xff\xff\xc4\0\3\0"
    return b"\xff\xd8" + comment + table + b"\xff\xc2\0\x0b\x08" + struct.pack(">HH", height, width)


def upload(chat: Chat, content: bytes = png(2, 3), field: str = "file") -> httpx.Response:
    return chat.http.post("/images", files={field: ("a cat.png", content, "image/png")})


def image_part(provider_name: str, encoded: str) -> tuple[str, str]:
    """The image as the model is told it."""
    url = f"data:image/png;base64,{encoded}"
    source = {"type": "base64", "media_type": "image/png", "data": encoded}
    parts = {
        "gemini": {"inline_data": {"data": encoded, "mime_type": "image/png"}},
        "openai": {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        "anthropic": {"type": "image", "source": source},
    }
    return ("tool", json.dumps(parts[provider_name], sort_keys=True))


def test_an_image_is_kept_shown_and_told(recipe, provider, provider_name, tmp_path):
    chat = Chat(recipe("images", provider_name).url)
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
    assert kept.read_bytes() == png(2, 3)
    preview = chat.http.get(address)
    assert (preview.content, preview.headers["content-type"]) == (png(2, 3), "image/png")

    assert shown(chat.say("what is it?", attachments=[image["id"]])) == []
    encoded = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAADCAIAAAA2iEnWcmVzdA=="
    question = [("user", "what is it?"), image_part(provider_name, encoded)]
    assert told(provider) == question
    (attachment,) = chat.items()[0]["attachments"]
    attachment.pop("thread_id", None)  # chatkit 1.6 adds it
    assert attachment == known
    chat.say("and now?")
    answered = [("assistant", "You said: what is it?"), ("user", "and now?")]
    assert told(provider) == [*question, *answered]

    chat.get("attachments.delete", attachment_id=image["id"])
    assert not kept.exists()
    assert chat.http.get(address).status_code == 404
    chat.say("still there?")
    said = "what is it?\n\nThe image a cat.png was deleted."
    assert told(provider)[:2] == [("user", said), answered[0]]


@one_provider
def test_images_that_are_refused(recipe, provider, provider_name, tmp_path):
    at = "https://chat.example/prefix/images"
    server = recipe("images", provider_name, CHATKIT_TOKENS=TOKENS, IMAGES_URL=at)
    alice, bob = Chat(server.url, "token-of-alice"), Chat(server.url, "token-of-bob")
    too_large = (413, {"detail": "An image may have 3750000 bytes and 8000 pixels a side."})
    no_image = (415, {"detail": "Only PNG and JPEG images can be sent."})
    for content, answer in (
        (png(2, 3) + bytes(3_750_000), too_large),
        (png(2, 3) + bytes(5_000_000), too_large),
        (png(8001, 1), too_large),
        (jpeg(8001, 1), too_large),
        (png(0, 1), no_image),
        (png(2, 3)[:30], no_image),
        (png(2, 3).replace(b"IHDR", b"IEND"), no_image),
        (png(2, 3).replace(b"\2\0\0\0\3", b"\2\0\0\0\4"), no_image),  # its sum does not fit
        (jpeg(2, 3)[:-1], no_image),
        (jpeg(2, 3).replace(b"\xff\xc2", b"\xff\xda"), no_image),
        (b"\xff\xd8\xff\xd8", no_image),
        (b"<script>", no_image),
        (b"", no_image),
    ):
        response = upload(alice, content)
        assert (response.status_code, response.json()) == answer, content[:40]
    assert upload(alice, field="picture").json() == {"detail": "The form has no file."}
    assert upload(Chat(server.url)).status_code == 401
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (iter([b"--b\r\n"]), bytes(4_000_000)):  # refused before it is read
        assert alice.http.post("/images", headers=form, content=body).status_code == 413
    two_phases = {"name": "a cat.png", "size": 1, "mime_type": "image/png"}
    assert alice.post("attachments.create", **two_phases).status_code == 400
    assert list((tmp_path / "images" / "images").iterdir()) == []

    image = upload(alice, jpeg(8000, 8000)).json()
    assert image["preview_url"] == f"{at}/{image['id']}.jpeg"
    for response in (
        bob.post("threads.create", input=message("", attachments=[image["id"]])),
        bob.post("attachments.delete", attachment_id=image["id"]),
    ):
        assert response.status_code == 404
        assert response.json() == {"detail": f"Attachment {image['id']} not found"}
    (kept,) = (tmp_path / "images" / "images").iterdir()
    assert (kept.read_bytes(), provider.requests) == (jpeg(8000, 8000), [])


@one_provider
def test_an_image_for_a_model_without_vision(recipe, provider, provider_name):
    """It is told the name, if LiteLLM knows that it has no vision. The person is told, too."""
    server = recipe(
        "both", provider_name, file_with("images", "model_picker"), MODELS="gpt-3.5-turbo,unknown"
    )
    chat = Chat(server.url)
    sent = [upload(chat).json()["id"]]
    blind = chat.say("look", attachments=sent, inference_options={"model": "gpt-3.5-turbo"})
    notice = "This model cannot see images. It is told their names only."
    assert shown(blind) == [{"type": "notice", "level": "warning", "message": notice}]
    named = "look\n\nThe image a cat.png, which you cannot see."
    assert told(provider) == [("user", named)]
    assert shown(chat.say("and now?", inference_options={"model": "gpt-3.5-turbo"})) == []
    assert told(provider)[0] == ("user", named)
    assert shown(chat.say("look", attachments=sent, inference_options={"model": "unknown"})) == []
    assert [role for role, _ in told(provider)].count("tool") == 2


# ---- Thoughts and sources -----------------------------------------------------------------------


def test_thoughts_are_shown(recipe, provider, provider_name):
    model = {"openai": "gpt-5"}.get(provider_name, "auto")
    chat = Chat(recipe("thoughts", provider_name, MODEL=model).url)
    provider.script["think"] = [[Thought("Let me "), Thought("think."), Text("Yes.")]]
    chat.say("think")
    body = provider.requests[0].body
    if provider_name == "gemini":
        thinking = {"thinkingLevel": "low", "includeThoughts": True}
        assert body["generationConfig"]["thinkingConfig"] == thinking
    elif provider_name == "openai":
        assert body["reasoning_effort"] == "low"
    else:
        assert body["thinking"] == {"type": "adaptive", "display": "summarized"}
        assert body["output_config"] == {"effort": "low"}
    thought = {"type": "thought", "content": "Let me think.", "status_indicator": "none"}
    workflow = {"type": "reasoning", "tasks": [thought], "summary": {"duration": 0}}
    workflow["expanded"] = False
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


# ---- The model picker ---------------------------------------------------------------------------


def choosing(model: str | None = None, tool: str | None = None) -> dict:
    """The options of a message, as ChatKit's composer sends them."""
    return {"inference_options": {"model": model, "tool_choice": tool and {"id": tool}}}


@pytest.mark.parametrize(
    ("provider_name", "other"),
    [
        ("gemini", "openai/gpt-4o-mini"),
        ("openai", "anthropic/claude-sonnet-4-6"),
        ("anthropic", "gemini/gemini-flash-latest"),
    ],
)
def test_a_model_picker(recipe, provider, provider_name, other):
    """The composer shows the models, and each message has its own."""
    server = recipe("model_picker", provider_name, MODELS=other)
    chat = Chat(server.url)
    page = chat.http.get("/chatkit").text
    options = json.loads(re.search(r"const options = (.*);", page)[1])
    default, second = options["composer"]["models"]
    assert default["id"].startswith(f"{provider_name}/")
    assert default["id"].endswith(default["label"])
    assert second == {"id": other, "label": other.partition("/")[2]}
    for choice in (default["id"], other, None):
        assert texts(chat.say("hello", **choosing(choice))) == ["You said: hello"]
        kind, _, model = (choice or default["id"]).partition("/")
        request = provider.requests[-1]
        assert request.format.__name__.lower() == kind
        assert request.body.get("model") == model or f"/models/{model}:" in request.path
        server.wait_for(f"thread={chat.thread_id} provider={kind} model={kind}/{model} end=done")


@one_provider
def test_the_error_of_a_picked_model(recipe, provider, provider_name):
    server = recipe("model_picker", provider_name, MODELS="groq/llama-3.3-70b-versatile")
    chat = Chat(server.url)
    provider.script["hello"] = [[Failure("key")]]
    error = error_of(chat.say("hello", **choosing("groq/llama-3.3-70b-versatile")))
    assert error.message == "The AI provider refused the key. Check GROQ_API_KEY."
    server.wait_for("provider=groq model=groq/llama-3.3-70b-versatile end=error")


@one_provider
def test_what_is_not_offered(recipe, provider, provider_name):
    """It is refused before anything is stored, also if a stored message is tried again."""
    more = 'main.server.store = sqlite_store.SQLiteStore("../chat.sqlite")'
    code = file_with("model_picker", "sqlite_store", "widget", more=more)
    before = recipe("before", provider_name, code, MODELS="gpt-4o-mini")
    chat = Chat(before.url)
    chat.say("hello", **choosing("gpt-4o-mini"))
    now = Chat(recipe("now", provider_name, code).url, thread_id=chat.thread_id)
    asked = chat.items()[0]["id"]
    refused = now.post("threads.retry_after_item", thread_id=chat.thread_id, item_id=asked)
    answers = [refused]
    for choice in (choosing("gpt-4o-mini"), choosing(tool="nope")):
        sent = message("hello", **choice)
        answers.append(now.post("threads.create", input=sent))
        answers.append(now.post("threads.add_user_message", thread_id=chat.thread_id, input=sent))
    model, tool = (
        (400, "The model gpt-4o-mini is not offered."),
        (400, "The tool nope is not offered."),
    )
    found = [(answer.status_code, answer.json()["detail"]) for answer in answers]
    assert found == [model, model, model, tool, tool]
    assert (len(now.items()), len(now.get("threads.list")["data"])) == (2, 1)
    assert len(provider.requests) == 1


@one_provider
def test_a_choice_holds_for_its_turn(recipe, provider, provider_name):
    """The model's after a client tool, too; the tool's in the agent's first step only."""
    names = ("client_tool", "hand_off", "widget", "model_picker")
    server = recipe("choices", provider_name, file_with(*names), MODELS="gpt-4o-mini")
    chat = Chat(server.url)
    provider.script["time"] = [[ToolCall("local_time")], [Text("Noon.")]]
    chat.say("time", **choosing("gpt-4o-mini", "local_time"))
    chat.answer("noon")
    calls = [[ToolCall("find_table", {"guests": 2})], [ToolCall("transfer_to_billing")]]
    provider.script["bill"] = [*calls, [Text("Yes?")]]
    chat.say("bill", **choosing(tool="find_table"))
    asked = [(seen.body["model"], seen.body.get("tool_choice")) for seen in provider.requests]

    def forced(tool: str) -> dict:
        return {"type": "function", "function": {"name": tool}}

    assert asked == [
        ("gpt-4o-mini", forced("local_time")),
        ("gpt-4o-mini", None),
        ("gpt-4o", forced("find_table")),
        ("gpt-4o", None),
        ("gpt-4o", None),
    ]


# ---- A second agent -----------------------------------------------------------------------------


def test_a_hand_off(recipe, provider, provider_name, main):
    """Who took over goes on, until it hands back."""
    chat = Chat(recipe("hand_off", provider_name).url)
    provider.script["my invoice is wrong"] = [
        [Text("One moment. "), ToolCall("transfer_to_billing")],
        [Text("Which number has it?")],
    ]
    assert texts(chat.say("my invoice is wrong")) == ["One moment. ", "Which number has it?"]
    assert [without_ids(item) for item in chat.items()[1:]] == [
        reply("One moment. "),
        reply("Which number has it?"),
    ]
    pair = tool_pair(provider_name, "transfer_to_billing", {}, '{"assistant": "Billing"}')
    assert told(provider)[-1] == pair[-1]
    provider.script["thanks"] = [[ToolCall("transfer_to_assistant")], [Text("Anything else?")]]
    for text in ("the number is 7", "thanks", "no"):
        chat.say(text)
    first = main.INSTRUCTIONS
    billing = "You answer questions about invoices. Ask for the invoice's number first."
    assert instructions(provider) == [first, billing, billing, billing, first, first]


HAND_OFFS = {
    "import Agent, ": "import handoff, Agent, ",
    "AGENTS = [first, billing]": """
refunds, euro = (Agent[Any](name, instructions=name) for name in ("Refunds", "REFUNDS"))
billing.handoffs += [handoff(refunds, tool_name_override="pay_back"), euro]
AGENTS = [first, billing, refunds, euro]
""",
}


@one_provider
def test_a_hand_off_that_does_not_end_well(recipe, provider, provider_name):
    """It holds after an error and a stop, and a rename meanwhile does, too."""
    code = changed((EXAMPLES / "hand_off.py").read_text(), HAND_OFFS)
    server = recipe("nested", provider_name, code)
    assert "name for the model" not in "\n".join(server.log)
    failed, stopped = Chat(server.url), Chat(server.url)
    handed_off = [ToolCall("transfer_to_billing")], [ToolCall("pay_back")]
    provider.script["fail"] = [*handed_off, [Failure("key")]]
    error_of(failed.say("fail"))

    silence = Silence()
    provider.script["stop"] = [*handed_off, [Text("We"), silence]]
    for event in stopped.start("stop"):
        if event.type == "thread.item.updated" and event.update.type.endswith("text_delta"):
            again = Chat(server.url, thread_id=stopped.thread_id)
            again.get("threads.update", thread_id=stopped.thread_id, title="Mine")
            break
    server.wait_for(f"thread={stopped.thread_id} ")
    for chat in (failed, stopped):
        chat.say("and now?")
        assert instructions(provider)[-1] == "Refunds"
    assert stopped.get("threads.get_by_id", thread_id=stopped.thread_id)["title"] == "Mine"


@one_provider
def test_names_of_agents_that_collide(recipe, provider, provider_name):
    """The model has one name for two tools; an agent with a tool name of its own has another."""
    changes = {**HAND_OFFS, 'handoff(refunds, tool_name_override="pay_back")': "refunds"}
    server = recipe(
        "twins", provider_name, changed((EXAMPLES / "hand_off.py").read_text(), changes)
    )
    warning = "Two agents have one tool name, and the model reaches only one: transfer_to_refunds"
    assert "\n".join(server.log).count(warning) == 1


# ---- The tools of MCP servers -------------------------------------------------------------------


def rainy(name: str = "MCP_SERVER", *arguments: object, weather: str = "rains") -> dict[str, str]:
    """The variable of an MCP server."""
    command = [sys.executable, SUPPORT / "mcp_server.py", weather, *arguments]
    return {name: shlex.join(map(str, command))}


def children(server: Server) -> list[int]:
    pid = server.process.pid
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@pytest.mark.slow
def test_the_tools_of_an_mcp_server(recipe, provider, provider_name):
    server = recipe("mcp_tools", provider_name, **rainy())
    chat = Chat(server.url)
    tool, arguments = "mcp_server__weather", {"city": "Rome"}
    provider.script["rain?"] = [[ToolCall(tool, arguments)], [Text("It does.")]]
    assert texts(chat.say("rain?")) == ["It does."]
    pair = tool_pair(provider_name, tool, arguments, "It rains in Rome.")
    assert told(provider) == [("user", "rain?"), *pair]
    assert f"PROVIDER={provider_name}, model" in "\n".join(server.log)  # main.py's own start
    (child,) = children(server)
    server.stop()
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.slow
@one_provider
def test_an_mcp_server_that_comes_and_goes(recipe, provider, provider_name, tmp_path):
    """Each is asked for its tools in each turn, and started if it does not answer."""
    late = rainy("MCP_SERVER_LATE", tmp_path / "there", weather="snows")
    server = recipe("mcp_tools", provider_name, **rainy("MCP_SERVER_SOON"), **late)
    assert "The MCP server late is away" in "\n".join(server.log)

    def weather(chats: int, *names: str) -> list[str]:
        """What the servers of these names answer, in so many chats at once."""
        provider.requests.clear()
        calls = [ToolCall(f"mcp_{name}__weather", {"city": "Rome"}) for name in names]
        questions = [f"rain {number}?" for number in range(chats)]
        provider.script.update({text: [calls, [Text("See above.")]] for text in questions})
        assert len(say_at_once(server.url, questions)) == chats
        said = str([seen.messages for seen in provider.requests])
        return sorted(re.findall(r"It (\w+) in Rome", said))

    assert weather(1, "soon") == ["rains"]
    (tmp_path / "there").touch()
    assert weather(1, "soon", "late") == ["rains", "snows"]
    for child in children(server):
        os.kill(child, signal.SIGKILL)
    assert weather(5, "soon", "late") == ["rains"] * 5 + ["snows"] * 5
    log = "\n".join(server.log)
    assert log.count("MCP server") == 1
    assert "Traceback" not in log


# ---- A login ------------------------------------------------------------------------------------

SECRET = "0123456789abcdef0123456789abcdef"
LOGIN = {"SESSION_SECRET": SECRET, "ALLOWED_ORIGINS": "https://shop.example"}


def cookie(secret: str = SECRET, algorithm: str = "HS256", **claims) -> dict[str, str]:
    claims = {"sub": "alice", "exp": time.time() + 60, **claims}
    claims = {name: value for name, value in claims.items() if value is not None}
    return {"Cookie": "session=" + jwt.encode(claims, secret, algorithm)}


@one_provider
def test_a_login_by_cookie(recipe, provider, provider_name):
    server = recipe("login", provider_name, **LOGIN)
    alice, bob = Chat(server.url), Chat(server.url)
    alice.http.headers.update(cookie())
    bob.http.headers.update(cookie(sub="bob"))
    assert texts(alice.say("hello")) == ["You said: hello"]
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
        nobody = Chat(server.url)
        nobody.http.headers.update(headers)
        for response in (nobody.post("threads.list"), nobody.http.get("/debug/threads")):
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
    first, last = server.log
    assert first.startswith(says) and last == "(end of log)"


# ---- Titles -------------------------------------------------------------------------------------


async def test_a_title_by_the_model(recipe, provider, provider_name):
    server = recipe("titles", provider_name)

    def title(chat: Chat) -> str:
        return chat.get("threads.get_by_id", thread_id=chat.thread_id)["title"]

    # The title is there while the reply streams: the client is told.
    provider.script["The chat starts with: hello"] = [[Text(" A greeting\n")]]
    slowly = [step for _ in range(200) for step in (Pause(0.02), Text("."))]
    provider.script["hello"] = [slowly]
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
    task = "Write a title of at most five words for a chat that starts as follows."
    assert asked.format.instructions(asked.body) == task

    # The turn does not wait for it. What the user writes meanwhile stays.
    renamed, late = Chat(server.url), Chat(server.url)
    for chat, words in ((renamed, "one"), (late, "two")):
        silence = Silence()
        provider.script[f"The chat starts with: {words}"] = [[silence, Text("A number")]]
        assert texts(chat.say(words)) == [f"You said: {words}"]
        assert title(chat) == words
        if chat is renamed:
            chat.get("threads.update", thread_id=chat.thread_id, title="mine")
        silence.end.set()
    await until(lambda: title(late) == "A number")
    assert title(renamed) == "mine"

    # An error leaves the first words, and one line in the log.
    provider.script["The chat starts with: three"] = [[Failure("key")]]
    start, failed = len(server.log), Chat(server.url)
    assert texts(failed.say("three")) == ["You said: three"]
    server.wait_for(f"No title for {failed.thread_id}")
    (line,) = [line for line in server.log[start:] if not line.startswith("INFO")]
    assert line.startswith(f"WARNING:  No title for {failed.thread_id}: AuthenticationError 401")
    assert title(failed) == "three"
    # The second message of a thread asks for none.
    provider.requests.clear()
    failed.say("four")
    assert [seen.message for seen in provider.requests] == ["four"]
