"""What providers really send, byte for byte: what the chat shows, stores and logs of it.

Each case runs on every provider on whose wire it can occur, against LiteLLM's real adapters.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import NamedTuple

import httpx
import pytest

from client import NO_TLS, Chat, done, error_of, load_main, text_of
from provider import (
    Anthropic,
    Body,
    Finish,
    Gemini,
    Ollama,
    OpenAI,
    Text,
    ToolCall,
    sse,
)

# server: the format of its provider
WIRES = {
    "gemini": Gemini,
    "openai": OpenAI,
    "anthropic": Anthropic,
    "ollama": Ollama,
    "openrouter": OpenAI,
    "mistral": OpenAI,
    "deepseek": OpenAI,
    "vllm": OpenAI,
    "groq": OpenAI,
    "azure": OpenAI,
}
COMPATIBLE = [name for name, wire in WIRES.items() if wire is OpenAI]
DONE = b"data: [DONE]\n\n"
JSON = "application/json"


def pieces(name: str, *steps) -> list[bytes]:
    """The steps in the provider's format. Bytes are meant as they are."""
    writer = WIRES[name]({"stream_options": {"include_usage": True}})
    sent = [step if isinstance(step, bytes) else writer.step(step) for step in steps]
    return [piece for piece in [writer.begin(), *sent] if piece]


def stream(name: str, *steps) -> Body:
    return Body(pieces(name, *steps), type=WIRES[name].type)


def error_in_a_stream(name: str, status: int, message: str) -> bytes:
    """An error as the provider sends it after a part of the reply."""
    if name == "ollama":
        return json.dumps({"error": message}).encode() + b"\n"
    if name == "gemini":
        return sse({"error": {"code": status, "message": message, "status": "INTERNAL"}})
    if name == "anthropic":
        error = {"type": "invalid_request_error" if status < 500 else "api_error"}
        return sse({"type": "error", "error": {**error, "message": message}}, "error")
    code = "rate_limit_exceeded" if status == 429 else "bad_request"
    return sse({"error": {"message": message, "type": "error", "param": None, "code": code}})


def refusal(status: int, message: str, name: str, **more) -> Body:
    """The whole answer is an error, in the provider's format."""
    body: dict = {"error": {"message": message, "type": "invalid_request_error", **more}}
    if name == "gemini":
        body = {"error": {"code": status, "message": message, "status": "ERROR", **more}}
    elif name == "anthropic":
        body["type"] = "error"
    elif name == "ollama":
        body = {"error": message}
    return Body([body], status, JSON)


def gemini_end(reason: str) -> bytes:
    """A chunk with a reason for the end, and nothing else."""
    return sse({"candidates": [{"finishReason": reason, "index": 0}], "modelVersion": "gemini"})


def openai_end(reason: str) -> bytes:
    return OpenAI({}).chunk({}, reason) + DONE


class Case(NamedTuple):
    """What the provider sends, and what comes of it."""

    wires: list[str]
    body: Callable[[str], Body]  # for the name of a wire
    says: str = ""  # a part of the error's message; none for a complete reply
    retry: bool = True
    kept: str = "The first half"


FIRST, HALF = Text("The first "), Text("half")
CUT = "cut off"
ANY = list(WIRES)

CASES = {
    # ---- The end of a reply
    "the connection closes": Case(ANY, lambda name: stream(name, FIRST), CUT, kept="The first "),
    "the connection closes in a line": Case(
        ANY,
        lambda name: stream(name, FIRST, WIRES[name]({}).step(HALF)[:60]),
        CUT,
        kept="The first ",
    ),
    "the connection closes at once": Case(
        ANY, lambda name: Body([b""], type=WIRES[name].type), "not understood", kept=""
    ),
    "[DONE] and no reason": Case(COMPATIBLE, lambda name: stream(name, FIRST, HALF, DONE)),
    "[DONE] with the last text": Case(
        COMPATIBLE, lambda name: Body([b"".join(pieces(name, FIRST, HALF, DONE))])
    ),
    "[DONE] in a text": Case(
        ANY,
        lambda name: stream(name, Text("data: [DONE]"), HALF, Finish()),
        kept="data: [DONE]half",
    ),
    "tokens after the end": Case(
        ["gemini"],
        lambda name: stream(
            name, FIRST, HALF, Finish(), sse({"usageMetadata": {"totalTokenCount": 10}})
        ),
    ),
    "the length limit": Case(
        ANY, lambda name: stream(name, FIRST, HALF, Finish("length")), "length limit", False
    ),
    "the context is full": Case(
        ["anthropic"],
        lambda name: Body(
            [
                piece.replace(b"max_tokens", b"model_context_window_exceeded")
                for piece in pieces(name, FIRST, HALF, Finish("length"))
            ]
        ),
        "length limit",
        False,
    ),
    **{
        f"{reason} after a text": Case(
            ["gemini"],
            lambda name, reason=reason: stream(name, FIRST, HALF, gemini_end(reason)),
            CUT,
        )
        for reason in ("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE")
    },
    "MALFORMED_FUNCTION_CALL": Case(
        ["gemini"],
        lambda name: stream(name, gemini_end("MALFORMED_FUNCTION_CALL")),
        "not understood",
        kept="",
    ),
    **{
        f"{reason} after a text": Case(
            COMPATIBLE,
            lambda name, reason=reason: stream(name, FIRST, HALF, openai_end(reason)),
            CUT,
        )
        for reason in ("error", "network_error")
    },
    # ---- Errors after a text
    **{
        f"{status} after a text": Case(
            ANY,
            lambda name, status=status: stream(
                name, FIRST, HALF, error_in_a_stream(name, status, "the model has failed")
            ),
            CUT,
        )
        for status in (400, 429, 500)
    },
    # ---- What the person in the chat can do
    "insufficient_quota": Case(
        COMPATIBLE,
        lambda name: refusal(429, "You exceeded your quota.", name, code="insufficient_quota"),
        "quota or credit",
        False,
        "",
    ),
    "payment required": Case(
        ANY,
        lambda name: refusal(402, "Insufficient Balance", name),
        "quota or credit",
        False,
        "",
    ),
    "the credit is used up": Case(
        ["anthropic"],
        lambda name: refusal(400, "Your credit balance is too low to access the API.", name),
        "quota or credit",
        False,
        "",
    ),
    "the key has expired": Case(
        ["gemini"],
        lambda name: refusal(
            400, "API key expired.", name, details=[{"reason": "API_KEY_INVALID"}]
        ),
        "Check GEMINI_API_KEY",
        False,
        "",
    ),
    **{
        f"an unknown {status}": Case(
            ANY,
            lambda name, status=status: refusal(status, "temperature: bad, at 14293", name),
            "The server's log has the reason",
            False,
            "",
        )
        for status in (400, 409, 422)
    },
    "digits like a status": Case(
        ANY,
        lambda name: refusal(503, "node 40301 is busy, 429 of 403 slots", name),
        "unavailable",
        True,
        "",
    ),
    "a refusal": Case(
        COMPATIBLE,
        lambda name: stream(
            name,
            OpenAI({}).chunk({"refusal": "I cannot "}),
            OpenAI({}).chunk({"refusal": "do that."}),
            Finish(),
        ),
        kept="I cannot do that.",
    ),
    # ---- Text as it was sent
    "characters that end lines elsewhere": Case(
        ANY,
        lambda name: Body(
            [
                piece.replace(rb"\u2028", "\u2028".encode())
                .replace(rb"\u2029", "\u2029".encode())
                .replace(rb"\u0085", "\u0085".encode())
                for piece in pieces(name, Text("a\u2028b\u2029c\u0085d"), Finish())
            ],
            type=WIRES[name].type,
        ),
        kept="a\u2028b\u2029c\u0085d",
    ),
    "an emoji in two halves": Case(
        ANY,
        lambda name: stream(name, Text("A\ud83d"), Text("\ude00 B"), Finish()),
        kept="A😀 B",
    ),
    "half an emoji": Case(
        ANY, lambda name: stream(name, Text("A\ud83d"), Text("B"), Finish()), kept="A�B"
    ),
    "half an emoji at the end": Case(
        ANY, lambda name: stream(name, Text("A"), Text("B\ud83d"), Finish()), kept="AB"
    ),
}


@pytest.mark.parametrize(
    ("name", "wire"), [(name, wire) for name, case in CASES.items() for wire in case.wires]
)
def test_what_a_provider_sends(servers, provider, name, wire):
    case = CASES[name]
    server = servers(wire)
    chat = Chat(server.url)
    provider.script["please"] = [[case.body(wire)]]
    start = len(server.log)
    events = chat.say("please")
    log = server.wait_for(f"thread={chat.thread_id} ")

    stored = [text_of(item) for item in chat.items()]
    assert stored == ["please", *[case.kept] * bool(case.kept)]
    shown = [event.item.id for event in events if event.type == "thread.item.added"]
    assert [item["id"] for item in chat.items()[1:]] == shown
    if case.says:
        error = error_of(events)
        assert case.says in error.message
        assert (error.code, error.allow_retry) == ("custom", case.retry)
        assert "\n".join(server.log[start:]).count(error.message) == 1
    else:
        assert not [event for event in events if event.type == "error"]
    assert f"thread={chat.thread_id} " in log
    assert f" end={'fault' if case.says else 'done'} " in log.split(chat.thread_id)[1]
    assert "Traceback" not in "\n".join(server.log[start:])
    assert [text_of(item) for item in done(chat.say("and on"))] == ["You said: and on"]


@pytest.mark.parametrize("wire", WIRES)
def test_tokens_that_the_provider_does_not_report(servers, provider, wire):
    if wire == "anthropic":
        pytest.skip("Anthropic always reports them")
    writer = WIRES[wire]({})
    end = [writer.step(Finish())]
    if wire == "gemini":
        end = [gemini_end("STOP")]
    elif wire == "ollama":
        end = [writer.line("", True, done_reason="stop")]
    usage = b'"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 3'
    provider.script["please"] = [
        [Body([p.replace(usage, b'"x": {"y": 7') for p in pieces(wire, FIRST)] + end)]
    ]
    server = servers(wire)
    chat = Chat(server.url)
    assert [text_of(item) for item in done(chat.say("please"))] == ["The first "]
    line = server.wait_for(f"thread={chat.thread_id} ").split(chat.thread_id)[1].split("\n")[0]
    assert line.endswith("input_tokens=- output_tokens=-")


# ---- Tools ----------------------------------------------------------------------


def test_a_tool_call_of_a_reply_that_was_cut_off(servers, provider):
    """Gemini sends a whole call in one chunk. It is not run: others may have had to follow."""
    provider.script["act"] = [[Body(pieces("gemini", Text("Now. "), ToolCall("clock")))]]
    chat = Chat(servers("customised_gemini").url)
    error = error_of(chat.say("act"))
    assert CUT in error.message and error.allow_retry
    assert [text_of(item) for item in chat.items()] == ["act", "Now. "]
    assert len(provider.requests) == 1


@pytest.mark.parametrize("wire", ["gemini", "openai", "anthropic"])
def test_a_tool_call_at_the_length_limit(servers, provider, wire):
    """Its arguments may be cut off, too."""
    provider.script["act"] = [[Text("Now. "), ToolCall("clock"), Finish("length")]]
    chat = Chat(servers(f"customised_{wire}").url)
    error = error_of(chat.say("act"))
    assert "length limit" in error.message and not error.allow_retry
    assert len(provider.requests) == 1


@pytest.mark.parametrize("wire", ["gemini", "openai", "anthropic"])
def test_a_model_that_calls_tools_for_ever(servers, provider, wire):
    provider.script["act"] = [[Text("Again. "), ToolCall("clock")]]
    server = servers(f"customised_{wire}")
    chat = Chat(server.url)
    start = len(server.log)
    error = error_of(chat.say("act"))
    assert "used tools again and again" in error.message and not error.allow_retry
    log = server.wait_for(f"thread={chat.thread_id} ")
    assert "Traceback" not in "\n".join(server.log[start:])
    assert log.count(error.message) == 1
    assert [text_of(item) for item in done(chat.say("and on"))] == ["You said: and on"]


def test_parallel_tool_calls_of_one_index(servers, provider):
    """Gemini's endpoint in OpenAI's format numbers every call 0."""
    calls = [
        OpenAI({}).chunk(
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": f"call_{hint}",
                        "type": "function",
                        "function": {"name": "clock", "arguments": "{}"},
                    }
                ]
            }
        )
        for hint in ("one", "two")
    ]
    provider.script["act"] = [
        [Body([*pieces("openai"), *calls, openai_end("tool_calls")])],
        [Text("It is noon, twice.")],
    ]
    chat = Chat(servers("customised_openai").url)
    assert [text_of(item) for item in done(chat.say("act"))] == ["It is noon, twice."]
    answered = [json.loads(text) for role, text in provider.requests[-1].messages if role == "tool"]
    outputs = [(item["tool_call_id"], item["content"]) for item in answered if "content" in item]
    assert [pair for pair in outputs if pair[1]] == [("call_one", "noon"), ("call_two", "noon")]


def test_a_mistake_in_the_server(servers, provider):
    """It is not the provider that is unavailable."""
    server = servers("customised_openai")
    chat = Chat(server.url)
    error = error_of(chat.say("a mistake in the server"))
    assert "The server's log has the reason" in error.message and not error.allow_retry
    assert "provider is unavailable" not in error.message
    server.wait_for("customised.py is wrong")
    assert provider.requests == []
    assert [text_of(item) for item in done(chat.say("and on"))] == ["You said: and on"]


# ---- Names and keys -------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "model"),
    [("gpt-oss", "openai/gpt-oss-20b"), ("openrouter", "openrouter/auto")],
)
def test_an_id_that_begins_like_a_prefix(servers, provider, server, model):
    Chat(servers(server).url).say("hello")
    assert provider.requests[0].body["model"] == model


def test_azure_with_its_key(servers, provider):
    """LiteLLM names all of Azure's variables as missing if one of them is."""
    server = servers("azure")
    (warning,) = [line for line in server.log if "is not set, which LiteLLM asks for" in line]
    assert "AZURE_API_VERSION" in warning
    assert "AZURE_API_KEY" not in warning and "AZURE_API_BASE" not in warning
    assert [text_of(item) for item in done(Chat(server.url).say("hello"))] == ["You said: hello"]
    assert provider.requests[0].key == "azure-key-0123456789"


def test_a_key_from_a_file(servers, provider):
    """It ends with a line break, which no header may hold."""
    Chat(servers("mistral").url).say("hello")
    assert provider.requests[0].key == "mistral-key-0123456789"


@pytest.mark.parametrize(
    ("environment", "key", "unset"),
    [
        ({"PROVIDER": "bedrock", "MODEL": "m"}, "credentials for bedrock", 2),
        ({"PROVIDER": "vertex_ai", "MODEL": "m"}, "credentials for vertex_ai", 2),
        ({"PROVIDER": "gemini", "GOOGLE_API_KEY": "x"}, "credentials for gemini", 0),
        (
            {"PROVIDER": "gemini", "GOOGLE_API_KEY": "x", "GEMINI_API_KEY": "y"},
            "credentials for gemini",
            0,
        ),
        ({"PROVIDER": "together_ai", "MODEL": "m", "TOGETHER_API_KEY": "x"}, "together_ai", 1),
        ({"PROVIDER": "groq", "MODEL": "m"}, "GROQ_API_KEY", 1),
        ({"PROVIDER": "groq", "MODEL": "m", "GROQ_API_KEY": "x"}, "GROQ_API_KEY", 0),
    ],
    ids=str,
)
def test_credentials_by_other_names(tmp_path, environment, key, unset):
    model = load_main(tmp_path, environment).model
    assert model.missing_key is None  # only a default provider is refused without asking
    assert key in model.key_name
    assert len(model.unset) == unset
    assert len(model.start_warnings()) == bool(unset)
    assert " is not set" in "".join(model.start_warnings() or [" is not set"])


@pytest.mark.parametrize(
    ("provider_name", "says"),
    [
        ("claude", "Did you mean anthropic or cloudflare?"),
        ("gemni", "Did you mean gemini?"),
        ("gpt", "Did you mean openai"),
        ("nothing like it", "needs MODEL, too."),
    ],
)
def test_the_providers_that_are_close(tmp_path, provider_name, says):
    with pytest.raises(SystemExit) as stop:
        load_main(tmp_path, {"PROVIDER": provider_name})
    assert says in stop.value.code
    assert stop.value.code.endswith(("?", "too."))


def test_a_claude_that_litellm_does_not_know(tmp_path):
    """It is asked for few tokens, and the operator reads how many."""
    known, unknown = (
        load_main(
            tmp_path / name, {"PROVIDER": "anthropic", "ANTHROPIC_API_KEY": "x", "MODEL": name}
        )
        for name in ("claude-sonnet-4-6", "claude-next")
    )
    assert known.model.start_warnings() == []
    (warning,) = unknown.model.start_warnings()
    assert f"after {unknown.DEFAULT_ANTHROPIC_CHAT_MAX_TOKENS} tokens" in warning


def test_a_model_of_the_responses_api(servers, provider):
    """LiteLLM 1.106 needs mcp 2.2 for it, which no Python 3.14 can install with this FastAPI."""
    server = servers("codex")
    chat = Chat(server.url)
    events = chat.say("hello")
    if version("mcp") >= "2.2":
        assert [text_of(item) for item in done(events)] == ["You said: hello"]
        assert provider.requests[0].path.endswith("/openai/responses")
        assert "cannot be used" not in "\n".join(server.log)
    else:
        log = server.wait_for("openai/gpt-5-codex cannot be used here: ")
        assert log.count("mcp 2.2 or newer") == 1
        assert "The server's log has the reason" in error_of(events).message


# ---- Nobody waits, and no traffic but to the provider ---------------------------


@pytest.mark.parametrize(
    "name", ["gemini", "openai", "anthropic", "mistral", "ollama", "vllm", "groq"]
)
def test_no_chat_waits_for_anything_but_its_provider(servers, name):
    """The servers of the tests refuse every address but the loopback, and say which was tried."""
    server = servers(name)
    slowest = 0.0
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, verify=NO_TLS) as http:
        started = time.monotonic()
        reply = pool.submit(Chat(server.url).say, "hello")
        while not reply.done():
            asked = time.monotonic()
            assert http.get("/health").json() == {"status": "ok"}
            slowest = max(slowest, time.monotonic() - asked)
        assert time.monotonic() - started < 2
    assert [text_of(item) for item in done(reply.result())] == ["You said: hello"]
    assert slowest < 0.2
    assert "OUTSIDE" not in "\n".join(server.log)
