"""A loopback stand-in for the HTTP APIs of Gemini, OpenAI, Anthropic and Ollama.

One FastAPI app speaks the wire formats, so that LiteLLM's real adapters run against it. A test
says what the model does as lists of steps, by the text of the user message that they answer:

    provider.script["What is the time?"] = [[Text("Let me look. "), ToolCall("clock")],
                                            [Text("It is noon.")]]

The first list answers the first request that carries this message, the second the next (after the
tool's output); the last one stays. Steps in a list of their own are sent in one piece. A message
without a script is answered with `echo(message)`. Every request is kept in `provider.requests`.

It refuses what the real providers refuse: `check` of each format, and RULES of single servers,
each of which has a path of its own. `provider.refused` tells what it was.

Run as a program (`python tests/support/provider.py PORT DELTAS PER_SECOND`) it answers every
request with DELTAS deltas, PER_SECOND of them each second (0: as fast as it can).
"""

import asyncio
import json
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import ClassVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

# ---- What a model can do: the steps of a script
Text = make_dataclass("Text", ["text"])  # a delta of the reply
Thought = make_dataclass("Thought", ["text"])  # a delta of the model's reasoning
Pause = make_dataclass("Pause", ["seconds"])  # nothing comes for so long
Raw = make_dataclass("Raw", ["body"])  # these bytes, as they are


@dataclass
class ToolCall:
    name: str
    arguments: dict | str = field(default_factory=dict)  # a str may be no JSON
    id: str = ""  # some providers give the same in each turn

    @property
    def text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)


@dataclass
class Finish:
    """Why the reply ends: "stop" (the default), "length", "filter", or "prompt" (was blocked)."""

    reason: str = "stop"


class Silence:
    """Nothing more comes, until the client leaves or `end` is set."""

    def __init__(self):
        self.end = threading.Event()


class Cut:
    """The connection is dropped in the middle of the body."""


class Stream(str):
    """A provider's error inside a stream that began well: `kind` as of Failure."""


# One of these is a whole answer.


class Reset:
    """The connection is reset before a byte of the answer."""


@dataclass
class Body:
    """Bytes of a stream, or what is sent as JSON."""

    content: bytes | dict
    status: int = 200


@dataclass
class Failure:
    """An error in the provider's own words: one of its format's `errors`, or of BODIES."""

    kind: str
    status: int | None = None  # in place of the usual one
    headers: dict[str, str] = field(default_factory=dict)


SECRET = "https://internal.example/v1?key=sk-secret"
"""Stands in the errors' texts, so that a test can see that none of it is passed on."""


def echo(message: str) -> list:
    """What the model answers to a message without a script."""
    return [Text("You said: "), *(Text(word) for word in re.findall(r"\S+\s*", message))]


# ---- The wire formats
def table(text: str) -> dict[str, tuple[int, str | None, str]]:
    """{kind: (status, the provider's code, its text)} of lines. The code "-" is null."""
    rows = [line.split(maxsplit=3) for line in text.strip().splitlines()]
    return {row[0]: (int(row[1]), row[2] if row[2] != "-" else None, row[3]) for row in rows}


def sse(data, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def is_blank(content: str | list | None) -> bool:
    """Whether a message's content in OpenAI's or Anthropic's format has no text, or a blank one."""
    parts = [{"text": content}] if isinstance(content, str) else content
    return not parts or any(not part["text"].strip() for part in parts if "text" in part)


def new_id() -> str:
    return f"call_{time.time_ns()}"


def as_tool(part: dict) -> tuple[str, str]:
    return "tool", json.dumps(part, sort_keys=True)


class Format:
    """What a provider reads and writes, for one request.

    `check` is what is wrong with a request, or "", and `fault` the answer to it. `messages` are
    (role, text) of each part; a tool call, its output and an image count as "tool".
    """

    type = "text/event-stream"
    errors: ClassVar[dict[str, tuple[int, str | None, str]]]

    def __init__(self, body: dict):
        self.calls = 0
        self.with_usage = (body.get("stream_options") or {}).get("include_usage")

    def error(self, kind: str, more: str = "") -> dict:
        status, code, message = self.errors[kind]
        return self.fault(f"{message} {SECRET}{more}", code, status)

    def begin(self) -> bytes:
        return b""


class Gemini(Format):
    """https://ai.google.dev/api/generate-content: POST models/…:streamGenerateContent?alt=sse"""

    errors = table("""
        key       400 INVALID_ARGUMENT API key not valid. Please pass a valid API key.
        forbidden 403 PERMISSION_DENIED Your API key does not have permission.
        model     404 NOT_FOUND models/nope is not found for API version v1beta.
        rate      429 RESOURCE_EXHAUSTED You exceeded your current quota.
        long      400 INVALID_ARGUMENT The input exceeds the maximum number of tokens allowed.
        policy    400 INVALID_ARGUMENT The request was rejected: content_policy_violation
        server    503 UNAVAILABLE The model is overloaded. Please try again later.
        image     400 INVALID_ARGUMENT Unable to process input image. Please retry.
        day       429 RESOURCE_EXHAUSTED GenerateRequestsPerDay, limit: 0
        minute    429 RESOURCE_EXHAUSTED GenerateRequestsPerMinute "retryDelay": "34s"
    """)
    usage: ClassVar = {"promptTokenCount": 7, "candidatesTokenCount": 3, "totalTokenCount": 10}
    about: ClassVar = {"usageMetadata": usage, "modelVersion": "gemini"}

    def fault(self, message: str, code: str = "INVALID_ARGUMENT", status: int = 400) -> dict:
        return {"error": {"code": status, "message": message, "status": code}}

    @staticmethod
    def check(body: dict) -> str:
        role, before = "", 0  # the role and the number of calls of the content before
        unsigned = False  # whether a call after the user's last text has no signature
        for number, content in enumerate(body["contents"]):
            parts = content["parts"]
            calls = [part for part in parts if "function_call" in part]
            outputs = sum("function_response" in part for part in parts)
            if not role and content["role"] != "user":
                return "Please ensure that multiturn requests begin with a user turn."
            if calls and role != "user":
                return "Please ensure that function call turn comes immediately after a user turn."
            if outputs and not before:
                return "A function response turn comes immediately after a function call turn."
            if outputs != before:
                return "The number of function response parts must be equal to that of the calls."
            if not parts or any(part.get("text") == "" for part in parts):
                return f"contents[{number}]: required oneof field 'data' must be initialized"
            if content["role"] == "user" and any("text" in part for part in parts):
                unsigned = False
            unsigned = unsigned or bool(calls and "thoughtSignature" not in calls[0])
            role, before = content["role"], len(calls)
        names = [f["name"] for tool in body.get("tools", []) for f in tool["function_declarations"]]
        if len(set(names)) < len(names):
            return f"Duplicate function declaration found: {names}"
        if unsigned:
            return "Function call is missing a thought_signature in functionCall parts."
        return "Requests end with a user role or a function response." if before else ""

    def chunk(self, parts: list | None = None, **candidate) -> bytes:
        candidate = {"content": {"parts": parts or [], "role": "model"}, "index": 0, **candidate}
        return sse({"candidates": [candidate], **self.about})

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.chunk([{"text": text}])
            case Thought(text):
                return self.chunk([{"text": text, "thought": True}])
            case ToolCall(name, arguments):
                call = {"name": name, "args": arguments}
                return self.chunk([{"functionCall": call, "thoughtSignature": "c2ln"}])
            case Stream():
                return sse(self.error(step))
            case Finish("prompt"):
                return sse({"promptFeedback": {"blockReason": "SAFETY"}, **self.about})
            case Finish("filter"):
                return sse({"candidates": [{"finishReason": "SAFETY", "index": 0}], **self.about})
            case Finish(reason):
                names = {"stop": "STOP", "length": "MAX_TOKENS"}
                return self.chunk([{"text": ""}], finishReason=names[reason])

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        roles = {"model": "assistant", "user": "user"}
        return [
            (roles[content["role"]], part["text"]) if "text" in part else as_tool(part)
            for content in body["contents"]
            for part in content["parts"]
        ]

    @staticmethod
    def instructions(body: dict) -> str:
        return "".join(part["text"] for part in body.get("system_instruction", {}).get("parts", []))


class OpenAI(Format):
    """https://platform.openai.com/docs/api-reference/chat/streaming: POST chat/completions"""

    errors = table("""
        key       401 invalid_api_key Incorrect API key provided: sk-secret.
        forbidden 403 unsupported_country_region_territory Country or region not supported
        project   403 model_not_found Project `proj_1` does not have access to model `gpt-4o`
        model     404 model_not_found The model `nope` does not exist or you have no access to it.
        rate      429 rate_limit_exceeded Rate limit reached for gpt-4o.
        tpm       429 rate_limit_exceeded Request too large for gpt-4o on tokens per min (TPM).
        tpm-groq  413 rate_limit_exceeded Request too large for model `llama-3.3-70b-versatile`.
        quota     429 insufficient_quota You exceeded your current quota.
        long      400 context_length_exceeded This model's maximum context length is 128000 tokens.
        policy    400 content_policy_violation Your request was rejected by our safety system.
        flagged   400 invalid_prompt Invalid prompt: it was flagged as violating our usage policy.
        azure     400 content_filter The prompt triggered Azure OpenAI's content management policy.
        tool      400 tool_use_failed Failed to call a function. See 'failed_generation'.
        image     400 invalid_image_format You uploaded an unsupported image.
        server    503 - The server is overloaded or not ready yet.
        no-tools  404 - No endpoints found that support tool use.
        calling   400 - gemma:2b does not support tools
        data-policy 404 - No endpoints found matching your data policy
        deployment 404 DeploymentNotFound The API deployment for this resource does not exist.
        access    403 AccessDenied Access denied due to Virtual Network rules.
    """)
    about: ClassVar = {"id": "chatcmpl-1", "created": 1, "model": "gpt-4o-2024-11-20"}
    usage: ClassVar = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    thought = "reasoning_content"  # where a delta has it

    def fault(self, message: str, code: str | None = None, status: int = 400) -> dict:
        return {"error": {"message": message, "type": "error", "param": None, "code": code}}

    @staticmethod
    def check(body: dict) -> str:
        waiting: set[str] = set()  # for the outputs of these calls
        end = {"role": "the end", "content": "."}
        for number, message in enumerate([*body["messages"], end]):
            if message["role"] == "tool":
                if message["tool_call_id"] not in waiting:
                    return "messages with role 'tool' must be a response to a preceeding message."
                waiting.remove(message["tool_call_id"])
                continue
            if waiting:
                return f"These tool_call_ids did not have response messages: {waiting}"
            waiting = {call["id"] for call in message.get("tool_calls") or ()}
            if is_blank(message.get("content")) and not waiting:
                return f"messages[{number}]: expected a text, but got an empty string."
        return ""

    def chunk(self, delta: dict, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return sse({**self.about, "object": "chat.completion.chunk", "choices": [choice]})

    def begin(self) -> bytes:
        return self.chunk({"role": "assistant", "content": ""})

    def complete(self, text: str) -> dict:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {**self.about, "object": "chat.completion", "choices": [choice], "usage": self.usage}

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.chunk({"content": text})
            case Thought(text):
                return self.chunk({self.thought: text})
            case ToolCall(name, text=text):
                call = {"id": step.id or new_id(), "type": "function", "index": self.calls}
                call["function"] = {"name": name, "arguments": ""}
                halves = [text[: len(text) // 2], text[len(text) // 2 :]]
                rest = [{"index": self.calls, "function": {"arguments": half}} for half in halves]
                self.calls += 1
                return b"".join(self.chunk({"tool_calls": [part]}) for part in (call, *rest))
            case Stream():
                return sse(self.error(step))
            case Finish(reason):
                names = {"stop": "tool_calls" if self.calls else "stop", "length": "length"}
                sent = self.chunk({}, names.get(reason, "content_filter"))
                if self.with_usage:
                    sent += sse({**self.about, "choices": [], "usage": self.usage})
                return sent + b"data: [DONE]\n\n"

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        found = []
        for message in body["messages"]:
            role, content = message["role"], message.get("content")
            if role == "system":
                continue
            if role == "tool" or message.get("tool_calls"):
                found.append(as_tool(message))
            elif isinstance(content, str):
                found.append((role, content))
            else:
                found += [(role, p["text"]) if "text" in p else as_tool(p) for p in content]
        return found

    @staticmethod
    def instructions(body: dict) -> str:
        return "".join(m["content"] for m in body["messages"] if m["role"] == "system")


class Anthropic(Format):
    """https://docs.anthropic.com/en/api/messages-streaming: POST v1/messages"""

    errors = table("""
        key        401 authentication_error invalid x-api-key
        forbidden  403 permission_error Your API key does not have permission to use the resource.
        model      404 not_found_error model: nope
        rate       429 rate_limit_error This request would exceed your organization's rate limit.
        long       400 invalid_request_error prompt is too long: 210000 tokens > 200000 maximum
        policy     400 invalid_request_error Output blocked by content filtering policy
        image      400 invalid_request_error Could not process image
        image-size 413 request_too_large Request exceeds the maximum size
        server     529 overloaded_error Overloaded
    """)
    about: ClassVar = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude"}

    def __init__(self, body: dict):
        super().__init__(body)
        self.block: str | None = None
        self.thinking = ""
        self.index = -1

    def fault(self, message: str, code: str = "invalid_request_error", status: int = 400) -> dict:
        return {"type": "error", "error": {"type": code, "message": message}}

    @staticmethod
    def check(body: dict) -> str:
        waiting: set[str] = set()  # for the results of these calls
        used: set[str] = set()
        turn: list[str] = []  # the types of the assistant's blocks since the user's last text
        last = len(body["messages"]) - 1
        for number, message in enumerate(body["messages"]):
            role, blocks, fault = message["role"], Anthropic.blocks(message), ""
            types = [block["type"] for block in blocks]
            results = {block["tool_use_id"] for block in blocks if "tool_use_id" in block}
            calls = {block["id"] for block in blocks if block["type"] == "tool_use"}
            thoughts = [block for block in blocks if block["type"] == "thinking"]
            if role != ("user" if number in (0, last) else role):
                fault = "first and last message must use the `user` role"
            elif results - waiting:
                fault = f"unexpected `tool_use_id` found in `tool_result` blocks: {results}"
            elif waiting - results or "tool_result" in types[len(results) :]:
                fault = "`tool_use` ids were found without `tool_result` blocks immediately after"
            elif is_blank(blocks):
                fault = "text content blocks must contain non-whitespace text"
            elif len(calls) < types.count("tool_use") or calls & used:
                fault = "`tool_use` ids must be unique"
            elif any(block["signature"] != sign(block["thinking"]) for block in thoughts):
                fault = "Invalid `signature` in `thinking` block"
            if fault:
                return f"messages.{number}: {fault}"
            waiting, used = calls, used | calls
            if role == "assistant":
                turn += types
            elif len(results) < len(blocks) and number < last:
                turn = []
        names = [tool["name"] for tool in body.get("tools", [])]
        if len(set(names)) < len(names):
            return "tools: Tool names must be unique."
        budget = (body.get("thinking") or {}).get("budget_tokens")
        if budget and turn[-1:] == ["tool_use"] and "thinking" not in turn[0]:
            return "When `thinking` is enabled, a final `assistant` message must start with it."
        return ""

    @staticmethod
    def blocks(message: dict) -> list[dict]:
        content = message["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def begin(self) -> bytes:
        usage = {"input_tokens": 7, "output_tokens": 1}
        message = {**self.about, "content": [], "usage": usage}
        started = sse({"type": "message_start", "message": message}, "message_start")
        return started + sse({"type": "ping"}, "ping")

    def delta(self, type: str, **delta: str) -> bytes:
        data = {"index": self.index, "delta": {"type": type, **delta}}
        return sse({"type": "content_block_delta", **data}, "content_block_delta")

    def open(self, kind: str | None, **block) -> bytes:
        """Close the open content block, unless it is of this kind, and open one."""
        if kind == self.block and kind != "tool_use":
            return b""
        out = b""
        if self.block == "thinking":
            out += self.delta("signature_delta", signature=sign(self.thinking))
        if self.block:
            out += sse({"type": "content_block_stop", "index": self.index}, "content_block_stop")
        self.block, self.thinking = kind, ""
        if kind:
            self.index += 1
            data = {"index": self.index, "content_block": {"type": kind, **block}}
            out += sse({"type": "content_block_start", **data}, "content_block_start")
        return out

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.open("text", text="") + self.delta("text_delta", text=text)
            case Thought(text):
                opened = self.open("thinking", thinking="", signature="")
                self.thinking += text
                return opened + self.delta("thinking_delta", thinking=text)
            case ToolCall(name, text=text):
                self.calls += 1
                opened = self.open("tool_use", id=step.id or new_id(), name=name, input={})
                return opened + self.delta("input_json_delta", partial_json=text)
            case Stream():
                return sse(self.error(step), "error")
            case Finish(reason):
                names = {"stop": "tool_use" if self.calls else "end_turn", "length": "max_tokens"}
                delta = {"stop_reason": names.get(reason, "refusal"), "stop_sequence": None}
                data = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 3}}
                end = sse(data, "message_delta") + sse({"type": "message_stop"}, "message_stop")
                return self.open(None) + end

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        return [
            (message["role"], part["text"]) if part["type"] == "text" else as_tool(part)
            for message in body["messages"]
            for part in Anthropic.blocks(message)
        ]

    @staticmethod
    def instructions(body: dict) -> str:
        system = body.get("system", "")
        return system if isinstance(system, str) else "".join(part["text"] for part in system)


def sign(thinking: str) -> str:
    """Anthropic's signature of a thinking block: it holds for the whole text."""
    return f"signature{zlib.crc32(thinking.encode())}"


class Ollama(Format):
    """https://docs.ollama.com/api/chat: POST api/chat, one JSON object a line"""

    type = "application/x-ndjson"
    errors = OpenAI.errors
    messages = staticmethod(OpenAI.messages)

    def fault(self, message: str, *_) -> dict:
        return {"error": message}

    @staticmethod
    def check(body: dict) -> str:
        if any(not isinstance(message.get("content", ""), str) for message in body["messages"]):
            return "json: cannot unmarshal array into Go struct field of type string"
        return ""

    def line(self, message: dict, **more) -> bytes:
        message = {"role": "assistant", "content": "", **message}
        line = {"model": "llama3.2", "message": message, "done": False, **more}
        return json.dumps(line).encode() + b"\n"

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.line({"content": text})
            case Thought(text):
                return self.line({"thinking": text})
            case ToolCall(name, arguments):
                function = {"index": self.calls, "name": name, "arguments": arguments}
                self.calls += 1
                call = {"id": step.id or new_id(), "function": function}
                return self.line({"tool_calls": [call]})
            case Finish(reason):
                usage = {"prompt_eval_count": 7, "eval_count": 3}
                return self.line({}, done=True, done_reason=reason, **usage)


class Responses(Format):
    """https://platform.openai.com/docs/api-reference/responses-streaming: POST responses"""

    check = staticmethod(lambda body: "")

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
                data = {"type": "response.output_text.delta", "delta": text, **place}
            case Finish():
                response = {"id": "resp_1", "created_at": 1, "output": [], "status": "completed"}
                response["usage"] = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
                data = {"type": "response.completed", "response": response}
        return sse(data, data["type"])

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        return OpenAI.messages({"messages": body["input"]})


def alternating(body: dict) -> str:
    """vLLM with a chat template as Mistral's or Gemma's. Calls and outputs do not count."""
    messages = [message for message in body["messages"] if message["role"] != "system"]
    roles = [m["role"] for m in messages if m["role"] != "tool" and not m.get("tool_calls")]
    if all(role == ("user", "assistant")[number % 2] for number, role in enumerate(roles)):
        return ""
    return "After the optional system message, conversation roles must alternate user/assistant"


def unparsed(body: dict) -> str:
    """vLLM (issue 43995) parses the arguments of each call."""
    calls = [call["function"] for m in body["messages"] for call in m.get("tool_calls") or []]
    try:
        return "".join("" for call in calls if json.loads(call["arguments"] or "{}"))
    except ValueError as error:
        return str(error)


def strings(body: dict) -> str:
    """Servers whose messages are strings."""
    is_list = any(isinstance(message.get("content"), list) for message in body["messages"])
    return "content: Input should be a valid string" if is_list else ""


def groq(body: dict) -> str:
    if strings({"messages": [m for m in body["messages"] if m["role"] in ("system", "assistant")]}):
        return "for 'role:system' and 'role:assistant' the content must be a string"
    if any("reasoning_content" in message for message in body["messages"]):
        return "property 'reasoning_content' is unsupported"
    return ""


def mistral(body: dict) -> str:
    known = {"role", "content", "tool_calls", "tool_call_id", "name", "prefix"}
    previous = ""
    for number, message in enumerate(body["messages"]):
        role, calls = message["role"], message.get("tool_calls") or []
        for name in set(message) - known:
            return f"messages.{number}.{role}.{name}: Extra inputs are not permitted"
        for id in [message.get("tool_call_id"), *(call["id"] for call in calls)]:
            if id and not re.fullmatch("[a-zA-Z0-9]{9}", id):
                return f"Tool call id was {id} but must be a-z, A-Z, 0-9, with a length of 9."
        if role == "user" and previous == "tool":
            return "Unexpected role 'user' after role 'tool'"
        if role == "assistant" and not calls and is_blank(message.get("content")):
            return "Assistant message must have either content or tool_calls, but not none."
        previous = role
    if previous not in ("user", "tool"):
        return f"Expected last role User or Tool for serving but got {previous}"
    if OpenAI.check(body):
        return "Not the same number of function calls and responses"
    return ""


def unsigned(body: dict) -> str:
    """OpenRouter with a Claude. Its thoughts are in reasoning_details, which LiteLLM drops."""
    blocks = [part for m in body["messages"] if m.get("content") for part in Anthropic.blocks(m)]
    is_signed = all("signature" in block for block in blocks if block["type"] == "thinking")
    return "" if is_signed else "thinking.signature: Field required"


def kimi(body: dict) -> str:
    """Kimi and DeepSeek, while they think: each call comes with its reasoning."""
    thinks = not re.match("deepseek-chat|moonshot-v1", body["model"])
    if not thinks or body.get("thinking") == {"type": "disabled"}:
        return ""
    calls = [message for message in body["messages"] if message.get("tool_calls")]
    is_missing = any(not message.get("reasoning_content") for message in calls)
    return "reasoning_content is missing in assistant tool call message" if is_missing else ""


OWN = (alternating, kimi, unparsed)  # what a strict server of one's own may refuse
# By the first part of the path. A test may change `provider.rules`; it is reset after each.
RULES: dict[str, tuple[Callable[[dict], str], ...]] = {
    "openai": (),
    "openrouter": (unsigned,),
    "own": (),  # for OPENAI_BASE_URL
    "groq": (groq,),
    "mistral": (mistral,),
    "deepseek": (kimi,),
    "vllm": (alternating, unparsed),
    **dict.fromkeys(["nvidia_nim", "zai"], ()),
}

NO_ACCESS = "You don't have access to the model with the specified model ID."
PAGE = "<html><h1>Log in to the network</h1></html>"
BODIES: dict[str, tuple[int, dict | str]] = {  # kind: the status, the body
    "html": (200, PAGE),  # a captive portal, or LM Studio
    "json": (200, {"hello": "world"}),
    "endpoint": (200, {"error": "Unexpected endpoint or method."}),  # LM Studio
    "no-route": (404, {"detail": "Not Found"}),  # vLLM, for a base URL without /v1
    "no-page": (404, "404 page not found"),  # the same of servers in Go
    "access-bedrock": (403, {"message": NO_ACCESS, "__type": "AccessDeniedException"}),
}


# ---- The server
@dataclass
class Seen:
    """One request as the provider saw it; `closed` is set when its answer is over."""

    format: type
    body: dict
    key: str
    path: str
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def messages(self) -> list[tuple[str, str]]:
        return self.format.messages(self.body)

    @property
    def message(self) -> str:
        """The newest text of the user: the last paragraph, because messages may be joined."""
        texts = [text for role, text in self.messages if role == "user"]
        return texts[-1].rpartition("\n\n")[2] if texts else ""


class Broken(Response):
    """No answer: the connection is reset."""

    async def __call__(self, scope, receive, send):
        transport = receive.__self__.transport  # of uvicorn
        linger = struct.pack("ii", 1, 0)  # to close is to reset
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
        await asyncio.sleep(0.01)  # until uvicorn knows


class Provider:
    """The app, its scripts and what it has seen; `with Provider() as provider:` serves it."""

    def __init__(self, answer=echo, per_second: float = 0):
        self.script: dict[str, list[list]] = {}
        self.requests: list[Seen] = []
        self.refused: list[tuple[str, str]] = []  # the path and the error
        self.rules = dict(RULES)
        self.answer = answer
        self.per_second = per_second
        self.app = FastAPI()
        for route, format in {
            "/gemini/models/{model}:streamGenerateContent": Gemini,
            "/anthropic/v1/messages": Anthropic,
            "/ollama/api/chat": Ollama,
            "/openai/responses": Responses,
            **{f"/{name}/{{path:path}}chat/completions": OpenAI for name in RULES},
        }.items():
            self.app.add_route(route, partial(self.respond, format), ["POST"])

    def reset(self):
        self.script.clear()
        self.requests.clear()
        self.refused.clear()
        self.rules.update(RULES)

    async def respond(self, format, request: Request):
        headers = ("x-goog-api-key", "x-api-key", "authorization")
        key = "".join(request.headers.get(name, "") for name in headers).removeprefix("Bearer ")
        seen = Seen(format, await request.json(), key, str(request.url))
        self.requests.append(seen)
        server = request.url.path.split("/")[1]
        writer = format(seen.body)
        for check in (*self.rules.get(server, ()), format.check):
            if fault := check(seen.body):
                self.refused.append((request.url.path, fault))
                seen.closed.set()
                return JSONResponse(writer.fault(fault), 400)
        if server in ("openrouter", "groq"):
            writer.thought = "reasoning"
        replies = self.script.get(seen.message) or [self.answer(seen.message)]
        steps = replies.pop(0) if len(replies) > 1 else replies[0]
        if steps and isinstance(steps[0], Body | Failure | Reset):
            seen.closed.set()
            return self.whole_answer(steps[0], writer, seen)
        if seen.body.get("stream") or "stream" in seen.path:
            return StreamingResponse(self.stream(writer, steps, seen), media_type=format.type)
        for step in steps:
            if isinstance(step, Silence):
                await self.silence(step)
        seen.closed.set()
        texts = [step.text for step in steps if isinstance(step, Text)]
        return JSONResponse(writer.complete("".join(texts)))

    def whole_answer(self, step: Body | Failure | Reset, writer, seen: Seen) -> Response:
        match step:
            case Reset():
                return Broken()
            case Body(bytes()):
                return Response(step.content, step.status, media_type="text/event-stream")
            case Body():
                return JSONResponse(step.content, step.status)
            case Failure(kind) if kind in BODIES:
                status, body = BODIES[kind]
            case Failure(kind):  # some providers repeat the key
                status = writer.errors[kind][0]
                body = writer.error(kind, f" The key was {seen.key}." if kind == "key" else "")
        if isinstance(body, str):
            return Response(body, status, media_type="text/html" if body is PAGE else "text/plain")
        return JSONResponse(body, step.status or status, step.headers)

    async def silence(self, step: Silence):
        while not step.end.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.02)

    async def stream(self, writer, steps: list, seen: Seen):
        finished = False
        started = time.perf_counter()
        try:
            if begin := writer.begin():
                yield begin
            for number, step in enumerate(steps):
                if self.per_second:
                    due = started + number / self.per_second - time.perf_counter()
                    await asyncio.sleep(max(due, 0))
                match step:
                    case Pause(seconds):
                        await asyncio.sleep(seconds)
                    case Silence():
                        await self.silence(step)
                    case Cut():
                        raise ConnectionError("cut on purpose")
                    case Raw(body):
                        yield body
                    case list(parts):
                        yield b"".join(map(writer.step, parts))
                    case _:
                        finished = finished or isinstance(step, (Finish, Stream))
                        yield writer.step(step)
            if not finished and not (steps and isinstance(steps[-1], Raw)):
                yield writer.step(Finish())
        finally:
            seen.closed.set()

    def open(self) -> list[Seen]:
        """The requests whose answers are still under way."""
        return [seen for seen in self.requests if not seen.closed.is_set()]

    def environment(self) -> dict[str, str]:
        """The variables that point LiteLLM at this provider, with keys that work here."""
        names = ("GEMINI", "OPENAI", "ANTHROPIC", "OLLAMA", "OPENROUTER", "DEEPSEEK", "GROQ")
        servers = {name: name.lower() for name in names} | {"HOSTED_VLLM": "vllm"}
        servers["MISTRAL_AZURE"] = "mistral"  # LiteLLM's only name for it
        keys = {f"{name}_API_KEY": f"{name.lower()}-key-0123456789" for name in servers}
        bases = {f"{name}_API_BASE": f"{self.url}/{path}" for name, path in servers.items()}
        return {"OPENAI_BASE_URL": bases.pop("OPENAI_API_BASE"), **bases, **keys}

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        # asyncio does not do it for such a listener: each answer would wait 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Not uvloop: as this process's policy it keeps playwright on Python < 3.12 from starting.
        self.server = uvicorn.Server(uvicorn.Config(self.app, loop="asyncio", **OPTIONS))
        self.thread = threading.Thread(target=self.server.run, args=[[listener]], daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


# After uvicorn's 5 seconds a connection could be closed as it is used again.
OPTIONS = {"log_level": "critical", "lifespan": "off", "timeout_keep_alive": 600}


class Now(Text):
    """A text delta that holds the time at which it is sent, in seconds."""

    text = property(lambda self: f"{time.time():.6f} ")

    def __init__(self):
        pass


if __name__ == "__main__":
    port, deltas, per_second = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    provider = Provider(lambda _: [Now()] * deltas, per_second)
    provider.requests = deque(maxlen=0)  # it keeps none
    uvicorn.run(provider.app, host="127.0.0.1", port=port, **OPTIONS)
