"""The recipes in tests/examples/, each run where it stands."""

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

import httpx
import jwt
import pytest
from agents import Handoff

from client import (
    EXAMPLES,
    SUPPORT,
    Chat,
    Server,
    again,
    changed,
    done,
    error_of,
    leave,
    many,
    message,
    processes,
    text_of,
    texts,
    until,
)
from conftest import MODELS
from provider import Failure, Pause, Silence, Text, Thought, ToolCall
from test_memory import conversation, pair, told


def choosing(model: str | None = None, tool: str | None = None) -> dict:
    """The options of a message, as ChatKit's composer sends them."""
    return {"inference_options": {"model": model, "tool_choice": tool and {"id": tool}}}


def file_with(*recipes: str, more: str = "") -> str:
    """A file of one's own with several recipes."""
    return f"import main, {', '.join(recipes)}\n{more}\nmain.serve()"


def test_all_recipes_in_one_file(recipe, provider):
    """None takes away what another one has added."""
    names = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "postgres_store")
    variables = {"MODEL": "gpt-5", "MODELS": "gpt-4o", **LOGIN, **rainy()}
    server = recipe("all", "openai", file_with(*names), **variables)
    chat = Chat(server.url)
    chat.http.headers.update(cookie())
    provider.script["hello"] = [[Text("See [1].")]]
    (item,) = done(chat.say("hello", **choosing("gpt-4o")))
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


def test_a_widget_with_a_button(recipe, provider):
    chat = Chat(recipe("widget", "openai").url)
    calls = [ToolCall("find_table", {"guests": 4})]
    provider.script["four of us"] = [calls, [Text("Here is one.")]]
    events = chat.say("four of us")
    progress = [event.text for event in events if event.type == "progress_update"]
    assert progress == ["Looking for a table…"]
    (offer,) = done(events, "widget")
    text, button = offer.widget.children
    assert (text.value, button.label) == ("A table for 4", "Book")
    click = button.onClickAction.model_dump(include={"type", "payload"})
    assert click == {"type": "book", "payload": {"guests": 4}}
    output = "The user sees the table and a button that books it."
    assert conversation(provider)[1:] == pair("find_table", {"guests": 4}, output)

    def clicked(action: dict) -> list:
        sender = {"thread_id": chat.thread_id, "item_id": offer.id}
        return list(chat.stream("threads.custom_action", **sender, action=action))

    before = chat.items()
    assert not [e for e in clicked({"type": "cook"}) if e.type.startswith("thread.item")]
    assert error_of(clicked({"type": "book", "payload": {"guests": 1000}})).code == "stream.error"
    assert chat.items() == before and before[1]["id"] == offer.id
    booked = clicked(click)[-1]
    assert (booked.type, booked.item.id) == ("thread.item.replaced", offer.id)
    text, caption = booked.item.widget.children
    assert (text.value, caption.value) == ("A table for 4", "Booked")
    question, card, reply = chat.items()
    assert [question, reply] == [before[0], before[2]] and "Booked" in str(card)

    chat.say("thanks")
    said = " ".join(text for _, text in told(provider))
    for text in ('"Booked"', "<HiddenContext>\nThe user booked the table for 4.\n"):
        assert said.count(text) == 1


def test_a_client_tool(recipe, provider):
    chat = Chat(recipe("client_tool", "openai").url)
    provider.script["what time is it?"] = [[ToolCall("local_time")], [Text("Noon.")]]
    (call,) = done(chat.say("what time is it?"), "client_tool_call")
    assert (call.name, call.arguments, call.status) == ("local_time", {}, "pending")
    assert texts(chat.answer({"time": "12:00"})) == ["Noon."]
    assert conversation(provider)[1:] == pair("local_time", {}, '{"time": "12:00"}')


def test_sources_are_shown(recipe, provider):
    chat = Chat(recipe("sources", "openai").url)
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
    assert conversation(provider)[1:] == pair("search", {"query": "returned"}, found)


def rainy(name: str = "MCP_SERVER", *arguments: object, weather: str = "rains") -> dict[str, str]:
    """The variable of an MCP server."""
    command = [sys.executable, SUPPORT / "mcp_server.py", weather, *arguments]
    return {name: shlex.join(map(str, command))}


@pytest.mark.slow
async def test_mcp_servers_that_come_and_go(recipe, provider, tmp_path):
    """Each is asked for its tools in each turn, started if it does not answer, and ended."""
    late = rainy("MCP_SERVER_LATE", tmp_path / "there", weather="snows")
    server = recipe("mcp_tools", "openai", **rainy("MCP_SERVER_SOON"), **late)
    log = "\n".join(server.log)
    assert "The MCP server late is away" in log
    assert "PROVIDER=openai, model" in log  # main.py's own start

    async def weather(chats: int, *names: str) -> list[str]:
        """What the servers of these names answer, in so many chats at once."""
        provider.requests.clear()
        calls = [ToolCall(f"mcp_{name}__weather", {"city": "Rome"}) for name in names]
        questions = [f"rain {number}?" for number in range(chats)]
        provider.script.update({text: [calls, [Text("See above.")]] for text in questions})
        assert await many(server.url, questions) == ["See above."] * chats
        said = str([seen.messages for seen in provider.requests])
        return sorted(re.findall(r"It (\w+) in Rome", said))

    assert await weather(1, "soon") == ["rains"]
    (tmp_path / "there").touch()
    assert await weather(1, "soon", "late") == ["rains", "snows"]
    for child in processes(server)[1:]:
        os.kill(child, signal.SIGKILL)
    assert await weather(5, "soon", "late") == ["rains"] * 5 + ["snows"] * 5
    provider.script["go"] = [[ToolCall("mcp_soon__weather", {"city": "Rome"})], [Text("It rains.")]]
    chat = Chat(server.url)
    chat.say("go")
    in_its_turn = conversation(provider)
    chat.say("and on")
    assert conversation(provider)[:-2] == in_its_turn
    log = "\n".join(server.log)
    assert log.count("MCP server") == 1 and "Traceback" not in log
    started = processes(server)[1:]
    server.stop()
    assert started and not any(map(os.path.exists, [f"/proc/{pid}" for pid in started]))


def png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"rest"


def jpeg(width: int, height: int) -> bytes:
    """A comment, a byte that only fills, a table, and the frame with the size."""
    comment, table = b"\xff\xfe\0\4\xff\xc0", b"\xff\xff\xc4\0\3\0"
    return b"\xff\xd8" + comment + table + b"\xff\xc2\0\x0b\x08" + struct.pack(">HH", height, width)


def upload(chat: Chat, content: bytes = png(2, 3), field: str = "file") -> httpx.Response:
    return chat.http.post("/images", files={field: ("a cat.png", content, "image/png")})


def test_an_image_is_kept_shown_and_told(recipe, provider, tmp_path):
    chat = Chat(recipe("images", "openai").url)
    image = upload(chat).json()
    kept = tmp_path / "images" / "images" / f"{image['id']}.png"
    assert re.fullmatch("atc_[0-9a-f]{32}", image["id"])  # nobody guesses it
    address = f"{str(chat.http.base_url).rstrip('/')}/images/{image['id']}.png"
    known = {key: value for key, value in image.items() if value is not None}
    facts = {"type": "image", "name": "a cat.png", "mime_type": "image/png"}
    assert known == {"id": image["id"], "preview_url": address, **facts}
    preview = chat.http.get(address)
    assert (preview.content, preview.headers["content-type"]) == (png(2, 3), "image/png")

    chat.say("what is it?", attachments=[image["id"]])
    url = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAADCAIAAAA2iEnWcmVzdA=="
    part = {"image_url": {"detail": "auto", "url": url}, "type": "image_url"}
    question = [("user", "what is it?"), ("tool", json.dumps(part))]
    assert told(provider) == question
    (attachment,) = chat.items()[0]["attachments"]
    attachment.pop("thread_id", None)  # chatkit 1.6 adds it
    assert attachment == known
    chat.say("and now?")
    answered = [("assistant", "You said: what is it?"), ("user", "and now?")]
    assert told(provider) == [*question, *answered]

    chat.get("attachments.delete", attachment_id=image["id"])
    assert not kept.exists() and chat.http.get(address).status_code == 404
    chat.say("still there?")
    said = "what is it?\n\nThe image a cat.png was deleted."
    assert told(provider)[:2] == [("user", said), answered[0]]


def test_images_that_are_refused(recipe, provider, tmp_path):
    at = "https://chat.example/prefix/images"
    server = recipe("images", "openai", IMAGES_URL=at, USERS="alice:a,bob:b")
    alice, bob = Chat(server.url, "a"), Chat(server.url, "b")
    too_large = (413, {"detail": "An image may have 3750000 bytes and 8000 pixels a side."})
    no_image = (415, {"detail": "Only PNG and JPEG images can be sent."})
    for content, answer in (
        (png(2, 3) + bytes(3_750_000), too_large),
        (png(8001, 1), too_large),
        (jpeg(8001, 1), too_large),
        (png(0, 1), no_image),
        (png(2, 3).replace(b"IHDR", b"IEND"), no_image),
        (png(2, 3).replace(b"\2\0\0\0\3", b"\2\0\0\0\4"), no_image),  # its sum does not fit
        (jpeg(2, 3)[:-1], no_image),
        (jpeg(2, 3).replace(b"\xff\xc2", b"\xff\xda"), no_image),
        (b"\xff\xd8\xff\xd8", no_image),
        (b"<script>", no_image),
    ):
        response = upload(alice, content)
        assert (response.status_code, response.json()) == answer, content[:40]
    assert upload(alice, field="picture").json() == {"detail": "The form has no file."}
    assert upload(Chat(server.url)).status_code == 401
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (iter([b"--b\r\n"]), bytes(4_000_000)):  # refused before it is read
        assert alice.http.post("/images", headers=form, content=body).status_code == 413
    assert list((tmp_path / "images" / "images").iterdir()) == []

    image = upload(alice, jpeg(8000, 8000)).json()
    assert image["preview_url"] == f"{at}/{image['id']}.jpeg"
    assert bob.post("attachments.delete", attachment_id=image["id"]).status_code == 404
    (kept,) = (tmp_path / "images" / "images").iterdir()
    assert (kept.read_bytes(), provider.requests) == (jpeg(8000, 8000), [])


def test_an_image_for_a_model_without_vision(recipe, provider):
    """It is told the name, if LiteLLM knows that it has no vision. The person is told, too."""
    code = file_with("images", "model_picker")
    chat = Chat(recipe("both", "openai", code, MODELS="gpt-3.5-turbo,unknown").url)
    sent = [upload(chat).json()["id"]]
    events = chat.say("look", attachments=sent, **choosing("gpt-3.5-turbo"))
    notices = [event.message for event in events if event.type == "notice"]
    assert notices == ["This model cannot see images. It is told their names only."]
    assert told(provider) == [("user", "look\n\nThe image a cat.png, which you cannot see.")]
    events = chat.say("look", attachments=sent, **choosing("unknown"))
    assert "notice" not in [event.type for event in events]
    assert [role for role, _ in told(provider)].count("tool") == 2


def test_thoughts_are_shown(recipe, provider, provider_name):
    """Those after a tool on their own."""
    model = {"openai": "gpt-5"}.get(provider_name, MODELS[provider_name])
    chat = Chat(recipe("thoughts", provider_name, MODEL=model).url)
    look = [Thought("Let me "), Thought("think."), ToolCall("nope")]
    provider.script["think"] = [look, [Thought("I know."), Text("Yes.")]]
    chat.say("think")
    asked = json.dumps(provider.requests[0].body)
    shows = '"includeThoughts": true' in asked
    assert '"low"' in asked and shows == (provider_name == "gemini")
    _, workflow, reply = chat.items()
    thoughts = [task["content"] for task in workflow["workflow"]["tasks"]]
    assert thoughts == ["Let me think.", "I know."]
    assert workflow["workflow"]["type"] == "reasoning" and text_of(reply) == "Yes."


def test_a_model_picker(recipe, provider):
    """The composer shows the models, and each message has its own."""
    claude, llama = "anthropic/claude-sonnet-4-6", "groq/llama-3.3-70b-versatile"
    server = recipe("model_picker", "openai", MODELS=f"{claude},{llama}")
    chat = Chat(server.url)
    options = re.search(r"const options = (.*);", chat.http.get("/chatkit").text)[1]
    models = ["openai/gpt-4o", claude, llama]
    offered = [{"id": model, "label": model.partition("/")[2]} for model in models]
    assert json.loads(options)["composer"]["models"] == offered
    for choice in ("openai/gpt-4o", claude, None):
        assert texts(chat.say("hello", **choosing(choice))) == ["You said: hello"]
        kind, _, model = (choice or "openai/gpt-4o").partition("/")
        request = provider.requests[-1]
        assert (request.format.__name__.lower(), request.body["model"]) == (kind, model)
        server.wait_for(f"thread={chat.thread_id} provider={kind} model={kind}/{model} end=done")
    provider.script["hello"] = [[Failure("key")]]
    assert "GROQ_API_KEY" in error_of(chat.say("hello", **choosing(llama))).message
    server.wait_for(f"provider=groq model={llama} end=error")


def test_what_is_not_offered(recipe, provider):
    """It is refused before anything is stored, also if a stored message is tried again."""
    withdraw = "main.app.post('/withdraw')(lambda: model_picker.OFFERED.popitem()[0])"
    code = file_with("model_picker", more=withdraw)
    chat = Chat(recipe("withdrawn", "openai", code, MODELS="openai/gpt-4o-mini").url)
    chosen = choosing("openai/gpt-4o-mini")
    chat.say("hello", **chosen)
    assert chat.http.post("/withdraw").is_success
    items, thread = chat.items(), {"thread_id": chat.thread_id}
    model = "The model openai/gpt-4o-mini"
    for name, type, params in (
        (model, "threads.retry_after_item", {**thread, "item_id": items[0]["id"]}),
        (model, "threads.add_user_message", {**thread, "input": message("hello", **chosen)}),
        ("The tool nope", "threads.create", {"input": message("hello", **choosing(tool="nope"))}),
    ):
        answer = chat.post(type, **params)
        assert (answer.status_code, answer.json()) == (400, {"detail": f"{name} is not offered."})
    assert chat.items() == items and len(chat.get("threads.list")["data"]) == 1
    assert len(provider.requests) == 1


def test_a_choice_holds_for_its_turn(recipe, provider):
    """The model's after a client tool, too; the tool's in the agent's first step only."""
    code = file_with("client_tool", "hand_off", "widget", "model_picker")
    chat = Chat(recipe("choices", "openai", code, MODELS="gpt-4o-mini").url)
    provider.script["time"] = [[ToolCall("local_time")], [Text("Noon.")]]
    chat.say("time", **choosing("gpt-4o-mini", "local_time"))
    chat.answer("noon")
    calls = [[ToolCall("find_table", {"guests": 2})], [ToolCall("transfer_to_billing")]]
    provider.script["bill"] = [*calls, [Text("Yes?")]]
    chat.say("bill", **choosing(tool="find_table"))
    asked = [(seen.body["model"], seen.body.get("tool_choice")) for seen in provider.requests]
    asked = [(model, choice and choice["function"]["name"]) for model, choice in asked]
    assert asked[:2] == [("gpt-4o-mini", "local_time"), ("gpt-4o-mini", None)]
    assert asked[2:] == [("gpt-4o", "find_table"), ("gpt-4o", None), ("gpt-4o", None)]


def instructions(provider) -> list[str]:
    """The instructions of each request."""
    return [seen.format.instructions(seen.body) for seen in provider.requests]


def test_a_hand_off(recipe, provider, main):
    """Who took over goes on, until it hands back."""
    chat = Chat(recipe("hand_off", "openai").url)
    first = [Text("One moment. "), ToolCall("transfer_to_billing")]
    provider.script["my invoice is wrong"] = [first, [Text("Which one?")]]
    assert texts(chat.say("my invoice is wrong")) == ["One moment. ", "Which one?"]
    back = ToolCall(Handoff.default_tool_name(main.server.agent))
    provider.script["thanks"] = [[back], [Text("Anything else?")]]
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
euro.handoffs += [Agent("Twin"), Agent("TWIN")]
AGENTS = [first, billing, refunds, euro]
""",
}


def test_a_hand_off_that_does_not_end_well(recipe, provider):
    """It holds after an error and a stop, and so does a rename. The start has warned of twins."""
    server = recipe("nested", "openai", changed((EXAMPLES / "hand_off.py").read_text(), HAND_OFFS))
    (warning,) = [line for line in server.log if "Two agents have one tool name" in line]
    assert warning.endswith("transfer_to_twin")
    failed, stopped = Chat(server.url), Chat(server.url)
    handed_off = [ToolCall("transfer_to_billing")], [ToolCall("pay_back")]
    provider.script["fail"] = [*handed_off, [Failure("key")]]
    error_of(failed.say("fail"))

    provider.script["stop"] = [*handed_off, [Text("We"), Silence()]]
    stream = stopped.start("stop")
    next(event for event in stream if '"We"' in event.model_dump_json())
    again(stopped).get("threads.update", thread_id=stopped.thread_id, title="Mine")
    stream.close()
    server.wait_for(f"thread={stopped.thread_id} ")
    for chat in (failed, stopped):
        chat.say("and now?")
        assert instructions(provider)[-1] == "Refunds"
    assert stopped.thread()["title"] == "Mine"


SECRET = "0123456789abcdef0123456789abcdef"
LOGIN = {"SESSION_SECRET": SECRET, "ALLOWED_ORIGINS": "https://shop.example"}


def cookie(secret: str = SECRET, algorithm: str = "HS256", **claims) -> dict[str, str]:
    claims = {"sub": "alice", "exp": time.time() + 60, **claims}
    claims = {name: value for name, value in claims.items() if value is not None}
    return {"Cookie": "session=" + jwt.encode(claims, secret, algorithm)}


def test_a_login_by_cookie(recipe, provider):
    server = recipe("login", "openai", **LOGIN)
    alice, bob = Chat(server.url), Chat(server.url)
    alice.http.headers.update(cookie())
    bob.http.headers.update(cookie(sub="bob"))
    assert texts(alice.say("hello")) == ["You said: hello"]
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


UNSAFE = [("ALLOWED_ORIGINS", "*", "With ALLOWED_ORIGINS=* any web page could")]
UNSAFE += [("SESSION_SECRET", "short", "SESSION_SECRET needs 32 characters")]


@pytest.mark.parametrize(("name", "value", "says"), UNSAFE)
def test_a_login_that_is_not_safe_does_not_start(tmp_path, name, value, says):
    environment = {"PROVIDER": "mock", **LOGIN, name: value}
    server = Server(tmp_path, environment, EXAMPLES / "login.py", fork=True)
    assert server.process.wait(60) == 1
    server.reader.join(10)
    first, last = server.log
    assert first.startswith(says) and last == "(end of log)"


async def test_a_title_by_the_model(recipe, provider):
    server = recipe("titles", "openai")

    # The client is told while the reply streams.
    provider.script["The chat starts with: hello"] = [[Text(" A greeting\n")]]
    provider.script["hello"] = [[step for _ in range(200) for step in (Pause(0.02), Text("."))]]
    early = Chat(server.url)
    events = leave(early.start("hello"), '"A greeting"')
    titles = [event.thread.title for event in events if event.type == "thread.updated"]
    assert titles == ["hello", "A greeting"] and early.thread()["title"] == "A greeting"
    (asked,) = [seen for seen in provider.requests if seen.message != "hello"]
    assert asked.messages == [("user", "The chat starts with: hello")]
    assert asked.format.instructions(asked.body).startswith("Write a title of at most five words")

    # The turn does not wait for it. What the user writes meanwhile stays.
    renamed, late = Chat(server.url), Chat(server.url)
    for chat, words in ((renamed, "one"), (late, "two")):
        silence = Silence()
        provider.script[f"The chat starts with: {words}"] = [[silence, Text("A number")]]
        assert texts(chat.say(words)) == [f"You said: {words}"]
        assert chat.thread()["title"] == words
        if chat is renamed:
            chat.get("threads.update", thread_id=chat.thread_id, title="mine")
        silence.end.set()
    await until(lambda: late.thread()["title"] == "A number")
    assert renamed.thread()["title"] == "mine"

    # An error leaves the first words, and one line in the log. A second message asks for no title.
    provider.script["The chat starts with: three"] = [[Failure("key")]]
    start, failed = len(server.log), Chat(server.url)
    assert texts(failed.say("three")) == ["You said: three"]
    server.wait_for(f"No title for {failed.thread_id}")
    (line,) = [line for line in server.log[start:] if not line.startswith("INFO")]
    assert line.startswith(f"WARNING:  No title for {failed.thread_id}: AuthenticationError 401")
    provider.requests.clear()
    failed.say("four")
    assert [seen.message for seen in provider.requests] == ["four"]
    assert failed.thread()["title"] == "three"
