"""A loopback stand-in for the Gemini, OpenAI and Anthropic HTTP APIs, mainly their streams.

One FastAPI app speaks the wire formats, so that LiteLLM's real adapters run against it. A test
says what the model does in terms common to all, a list of steps, keyed by the text of the user
message that it answers:

    provider.script["What is the time?"] = [[Text("Let me look. "), ToolCall("clock")],
                                            [Text("It is noon.")]]

The first list answers the first request that carries this message, the second the
next (after the tool's output); the last one stays. A message without a script is
answered with `echo(message)`. Every request is kept in `provider.requests`.

It refuses what the real providers refuse, in their words: `check` of each format, and RULES of
single servers, each of which has a path of its own. `provider.refused` tells what it was.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

# ---- What a model can do: the steps of a script ---------------------------------


@dataclass
class Text:
    """One text delta."""

    text: str


@dataclass
class Thought:
    """One delta of the model's reasoning."""

    text: str


@dataclass
class ToolCall:
    name: str
    arguments: dict = field(default_factory=dict)
    id: str = ""  # some providers give the same in each turn


@dataclass
class Finish:
    """Why the reply ended: "stop" (what a script without a Finish ends with),
    "length", "filter" (blocked while answering), or "prompt" (the prompt was blocked)."""

    reason: str = "stop"


class Silence:
    """Send nothing more, until the client leaves or `end` is set."""

    def __init__(self):
        self.end = threading.Event()


@dataclass
class Pause:
    """Send nothing for some seconds."""

    seconds: float


class Cut:
    """Drop the connection in the middle of the body."""


class Reset:
    """Reset the connection before a byte of the answer. It is the only step."""


@dataclass
class Together:
    """These steps in one piece, so that they arrive together."""

    steps: list


@dataclass
class Raw:
    """These bytes, as they are."""

    body: bytes


@dataclass
class Body:
    """The whole answer in the provider's own bytes.

    Each piece is sent on its own; one that is no bytes is sent as JSON. With `cut` the connection
    is dropped before the body's end.
    """

    pieces: list
    status: int = 200
    type: str = "text/event-stream"
    cut: bool = False


@dataclass
class Failure:
    """The whole answer is an error, in the provider's own words.

    `kind` is one of the format's `errors`, or of BODIES. A status here replaces the usual one.
    """

    kind: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


class Stream(str):
    """A provider's error inside a stream that began well: `kind` as of Failure."""


SECRET = "https://internal.example/v1?key=sk-secret"
"""Stands in the errors' texts, so that a test can see that none of it is passed on."""


def echo(message: str) -> list:
    """What the model answers to a message without a script."""
    return [Text("You said: "), *(Text(word) for word in re.findall(r"\S+\s*", message))]


# ---- The wire formats -----------------------------------------------------------

Refusal = tuple[int, dict]  # the status and the body


def table(text: str) -> dict[str, tuple[int, str | None, str]]:
    """{kind: (status, the provider's code, its text)} of lines. The code "-" is null."""
    rows = [line.split(maxsplit=3) for line in text.strip().splitlines()]
    return {row[0]: (int(row[1]), row[2] if row[2] != "-" else None, row[3]) for row in rows}


def sse(data, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def error(message: str, code: Any = None, type: str = "invalid_request_error", **more) -> dict:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": type, "param": None, "code": code, **more}}


def is_blank(content: str | list | None) -> bool:
    """Whether a message's content in OpenAI's or Anthropic's format has no text, or a blank one."""
    parts = [{"text": content}] if isinstance(content, str) else content
    return not parts or any(not part["text"].strip() for part in parts if "text" in part)


def as_tool(part: dict) -> tuple[str, str]:
    return "tool", json.dumps(part, sort_keys=True)


class Gemini:
    """https://ai.google.dev/api/generate-content: POST models/…:streamGenerateContent?alt=sse"""

    type = "text/event-stream"
    errors: ClassVar = table("""
        key       400 INVALID_ARGUMENT API key not valid. Please pass a valid API key.
        forbidden 403 PERMISSION_DENIED Your API key does not have permission.
        model     404 NOT_FOUND models/nope is not found for API version v1beta.
        rate      429 RESOURCE_EXHAUSTED You exceeded your current quota.
        long      400 INVALID_ARGUMENT The input token count (1200000) exceeds the maximum number\
 of tokens allowed (1048576).
        policy    400 INVALID_ARGUMENT The request was rejected: content_policy_violation
        server    503 UNAVAILABLE The model is overloaded. Please try again later.
        image     400 INVALID_ARGUMENT Unable to process input image. Please retry.
    """)
    usage: ClassVar = {"promptTokenCount": 7, "candidatesTokenCount": 3, "totalTokenCount": 10}
    about: ClassVar = {"usageMetadata": usage, "modelVersion": "gemini", "responseId": "resp-1"}

    def __init__(self, body: dict):
        pass

    def error(self, kind: str, more: str = "") -> dict:
        status, state, message = self.errors[kind]
        return {"error": {"code": status, "message": f"{message} {SECRET}{more}", "status": state}}

    @staticmethod
    def check(body: dict) -> Refusal | None:
        def refused(message: str) -> Refusal:
            return 400, {"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}

        role, before = "", 0  # the role and the number of calls of the content before
        unsigned = False  # whether a call after the user's last text has no signature
        for number, content in enumerate(body["contents"]):
            parts, fault = content["parts"], ""
            calls = [part for part in parts if "function_call" in part]
            outputs = sum("function_response" in part for part in parts)
            if not role and content["role"] != "user":
                fault = "multiturn requests begin with a user turn"
            elif calls and role != "user":
                fault = "function call turn comes immediately after a user turn"
            elif bool(outputs) != bool(before):
                fault = "function response turn comes immediately after a function call turn"
            elif outputs != before:
                fault = "the number of function response parts is equal to the number of function"
                fault += " call parts of the function call turn"
            if fault:
                return refused(f"Please ensure that {fault}.")
            if not parts or any(part.get("text") == "" for part in parts):
                place = f"GenerateContentRequest.contents[{number}].parts[0].data"
                return refused(f"* {place}: required oneof field 'data' must be initialized")
            if content["role"] == "user" and any("text" in part for part in parts):
                unsigned = False
            unsigned = unsigned or bool(calls and "thoughtSignature" not in calls[0])
            role, before = content["role"], len(calls)
        names = [f["name"] for tool in body.get("tools", []) for f in tool["function_declarations"]]
        if len(set(names)) < len(names):
            return refused(f"Duplicate function declaration found: {names}")
        if unsigned:
            return refused("Function call is missing a thought_signature in functionCall parts.")
        return refused("Requests end with a user role or a function response.") if before else None

    def chunk(self, parts: list | None = None, **candidate) -> bytes:
        candidate = {"content": {"parts": parts or [], "role": "model"}, "index": 0, **candidate}
        return sse({"candidates": [candidate], **self.about})

    def begin(self) -> bytes:
        return b""

    def complete(self, text: str) -> dict:
        """The answer to a request that does not stream."""
        return json.loads(self.chunk([{"text": text}], finishReason="STOP").removeprefix(b"data: "))

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
                feedback = {"blockReason": "SAFETY", "safetyRatings": []}
                return sse({"promptFeedback": feedback, **self.about})
            case Finish("filter"):
                rating = {"category": "HARM_CATEGORY_HARASSMENT", "probability": "HIGH"}
                ratings = [{**rating, "blocked": True}]
                candidate = {"finishReason": "SAFETY", "index": 0, "safetyRatings": ratings}
                return sse({"candidates": [candidate], **self.about})
            case Finish(reason):
                names = {"stop": "STOP", "length": "MAX_TOKENS"}
                return self.chunk([{"text": ""}], finishReason=names[reason])

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        """(role, text) of each part: a tool call, its output and an image count as "tool"."""
        roles = {"model": "assistant", "user": "user"}
        return [
            (roles[content["role"]], part["text"]) if "text" in part else as_tool(part)
            for content in body["contents"]
            for part in content["parts"]
        ]

    @staticmethod
    def instructions(body: dict) -> str:
        return "".join(part["text"] for part in body.get("system_instruction", {}).get("parts", []))


class OpenAI:
    """https://platform.openai.com/docs/api-reference/chat/streaming: POST chat/completions"""

    type = "text/event-stream"
    errors: ClassVar = table("""
        key       401 invalid_api_key Incorrect API key provided: sk-secret.
        forbidden 403 unsupported_country_region_territory Country, region, or territory not\
 supported
        project   403 model_not_found Project `proj_1` does not have access to model `gpt-4o`
        model     404 model_not_found The model `nope` does not exist or you do not have access to\
 it.
        rate      429 rate_limit_exceeded Rate limit reached for gpt-4o.
        tpm       429 rate_limit_exceeded Request too large for gpt-4o in organization org-1 on\
 tokens per min (TPM): Limit 30000, Requested 40000. The input or output tokens must be reduced in\
 order to run successfully.
        tpm-groq  413 rate_limit_exceeded Request too large for model `llama-3.3-70b-versatile` in\
 organization `org_1` service tier `on_demand` on tokens per minute (TPM): Limit 12000, Requested\
 40000, please reduce your message size and try again.
        quota     429 insufficient_quota You exceeded your current quota, please check your plan\
 and billing details.
        long      400 context_length_exceeded This model's maximum context length is 128000 tokens.\
 However, your messages resulted in 130000 tokens.
        policy    400 content_policy_violation Your request was rejected by our safety system.
        flagged   400 invalid_prompt Invalid prompt: your prompt was flagged as potentially\
 violating our usage policy. Please try again with a different prompt:
        azure     400 content_filter The response was filtered due to the prompt triggering Azure\
 OpenAI's content management policy. Please modify your prompt and retry.
        tool      400 tool_use_failed Failed to call a function. Please adjust your prompt. See\
 'failed_generation' for more details.
        image     400 invalid_image_format You uploaded an unsupported image. Please make sure your\
 image has of one the following formats: ['png', 'jpeg', 'gif', 'webp'].
        server    503 - The server is overloaded or not ready yet.
    """)
    about: ClassVar = {"id": "chatcmpl-1", "created": 1, "model": "gpt-4o-2024-11-20"}
    usage: ClassVar = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    thought = "reasoning_content"  # where a delta has it
    ids = "call_{}"

    def __init__(self, body: dict):
        self.calls = 0
        self.with_usage = (body.get("stream_options") or {}).get("include_usage")

    def error(self, kind: str, more: str = "") -> dict:
        _, code, message = self.errors[kind]
        types = {"rate_limit_exceeded": "tokens", "insufficient_quota": "insufficient_quota"}
        return error(f"{message} {SECRET}{more}", code, types.get(code, "invalid_request_error"))

    @staticmethod
    def check(body: dict) -> Refusal | None:
        waiting: set[str] = set()  # for the outputs of these calls
        end = {"role": "the end", "content": "."}
        for number, message in enumerate([*body["messages"], end]):
            place = f"messages[{number}]"
            if message["role"] == "tool" and message["tool_call_id"] in waiting:
                waiting.remove(message["tool_call_id"])
                continue
            if message["role"] == "tool":
                words = "must be a response to a preceeding message with 'tool_calls'."
                return 400, error(f"messages with role 'tool' {words}", param=f"{place}.role")
            if waiting:
                return 400, error(
                    "An assistant message with 'tool_calls' must be followed by tool messages"
                    " responding to each 'tool_call_id'. The following tool_call_ids did not have"
                    f" response messages: {', '.join(sorted(waiting))}",
                    param=f"{place}.role",
                )
            waiting = {call["id"] for call in message.get("tool_calls") or ()}
            if is_blank(message.get("content")) and not waiting:
                words = f"Invalid '{place}.content': expected a text, but got an empty string."
                return 400, error(words, "empty_string", param=f"{place}.content")
        return None

    def chunk(self, delta: dict, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse({**self.about, "object": "chat.completion.chunk", "choices": [choice]})

    def begin(self) -> bytes:
        return self.chunk({"role": "assistant", "content": "", "refusal": None})

    def complete(self, text: str) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        kind = "chat.completion"
        return {**self.about, "object": kind, "choices": [choice], "usage": self.usage}

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.chunk({"content": text})
            case Thought(text):
                return self.chunk({self.thought: text})
            case ToolCall(name, arguments):
                id = step.id or self.ids.format(str(time.time_ns())[-9:])
                call = {"id": id, "type": "function"}
                call |= {"index": self.calls, "function": {"name": name, "arguments": ""}}
                text = json.dumps(arguments)
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
                    last = {"object": "chat.completion.chunk", "choices": [], "usage": self.usage}
                    sent += sse({**self.about, **last})
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
        return "".join(
            message["content"] for message in body["messages"] if message["role"] == "system"
        )


class Anthropic:
    """https://docs.anthropic.com/en/api/messages-streaming: POST v1/messages"""

    type = "text/event-stream"
    errors: ClassVar = table("""
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
        self.calls = 0
        self.block: str | None = None
        self.thinking = ""
        self.index = -1

    def error(self, kind: str, more: str = "") -> dict:
        _, name, message = self.errors[kind]
        fault = {"type": name, "message": f"{message} {SECRET}{more}"}
        return {"type": "error", "error": fault, "request_id": "req_1"}

    @staticmethod
    def check(body: dict) -> Refusal | None:
        def refused(message: str) -> Refusal:
            fault = {"type": "invalid_request_error", "message": message}
            return 400, {"type": "error", "error": fault, "request_id": "req_1"}

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
                fault = "`tool_use` ids were found without `tool_result` blocks immediately after:"
                fault += f" {waiting}"
            elif is_blank(blocks):
                fault = "text content blocks must contain non-whitespace text"
            elif len(calls) < types.count("tool_use") or calls & used:
                fault = "`tool_use` ids must be unique"
            elif any(block["signature"] != sign(block["thinking"]) for block in thoughts):
                fault = "Invalid `signature` in `thinking` block"
            if fault:
                return refused(f"messages.{number}: {fault}")
            waiting, used = calls, used | calls
            if role == "assistant":
                turn += types
            elif len(results) < len(blocks) and number < last:
                turn = []
        names = [tool["name"] for tool in body.get("tools", [])]
        if len(set(names)) < len(names):
            return refused("tools: Tool names must be unique.")
        budget = (body.get("thinking") or {}).get("budget_tokens")
        if budget and turn[-1:] == ["tool_use"] and "thinking" not in turn[0]:
            return refused(
                f"messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found"
                f" `{turn[0]}`. When `thinking` is enabled, a final `assistant` message must start"
                " with a thinking block."
            )
        return None

    @staticmethod
    def blocks(message: dict) -> list[dict]:
        content = message["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def begin(self) -> bytes:
        usage = {"input_tokens": 7, "output_tokens": 1}
        message = {**self.about, "content": [], "usage": usage}
        started = sse({"type": "message_start", "message": message}, "message_start")
        return started + sse({"type": "ping"}, "ping")

    def complete(self, text: str) -> dict:
        usage = {"input_tokens": 7, "output_tokens": 3}
        content = [{"type": "text", "text": text}]
        return {**self.about, "content": content, "stop_reason": "end_turn", "usage": usage}

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
            case ToolCall(name, arguments):
                self.calls += 1
                id = step.id or f"toolu_{time.time_ns()}"
                opened = self.open("tool_use", id=id, name=name, input={})
                return opened + self.delta("input_json_delta", partial_json=json.dumps(arguments))
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


class Ollama(OpenAI):
    """https://docs.ollama.com/api/chat: POST api/chat, one JSON object a line"""

    type = "application/x-ndjson"

    def error(self, kind: str, more: str = "") -> dict:
        return {"error": f"{self.errors[kind][2]} {SECRET}{more}"}

    @staticmethod
    def check(body: dict) -> Refusal | None:
        for message in body["messages"]:
            if not isinstance(message.get("content", ""), str):
                words = "json: cannot unmarshal array into Go struct field of type string"
                return 400, {"error": words}
        return None

    def line(self, content: str, done: bool = False, **more) -> bytes:
        message = {"role": "assistant", "content": content}
        message |= {name: more.pop(name) for name in ("thinking", "tool_calls") if name in more}
        line = {"model": "llama3.2", "message": message, "done": done, **more}
        return json.dumps(line).encode() + b"\n"

    def begin(self) -> bytes:
        return b""

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.line(text)
            case Thought(text):
                return self.line("", thinking=text)
            case ToolCall(name, arguments):
                function = {"index": self.calls, "name": name, "arguments": arguments}
                self.calls += 1
                id = self.ids.format(str(time.time_ns())[-9:])
                return self.line("", tool_calls=[{"id": id, "function": function}])
            case Finish(reason):
                return self.line("", True, done_reason=reason, prompt_eval_count=7, eval_count=3)


class Responses(OpenAI):
    """https://platform.openai.com/docs/api-reference/responses-streaming: POST responses"""

    def __init__(self, body: dict):
        super().__init__(body)
        self.number = -1
        self.text = ""

    @staticmethod
    def check(body: dict) -> Refusal | None:
        ids: dict[str, set[str]] = {"function_call": set(), "function_call_output": set()}
        for item in body["input"] if isinstance(body["input"], list) else []:
            if item.get("type") in ids:
                ids[item["type"]].add(item["call_id"])
        calls, outputs = ids.values()
        if calls - outputs:
            return 400, error(f"No tool output found for function call {calls - outputs}.")
        if outputs - calls:
            return 400, error(f"No tool call found for function call output {outputs - calls}.")
        return None

    def event(self, type: str, **more) -> bytes:
        self.number += 1
        return sse({"type": type, "sequence_number": self.number, **more}, type)

    def response(self, status: str, output: list, **more) -> dict:
        response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5-codex"}
        response |= dict.fromkeys(("error", "incomplete_details", "instructions"))
        response |= {
            "metadata": {},
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
        }
        return {
            **response,
            "temperature": 1.0,
            "top_p": 1.0,
            "status": status,
            "output": output,
            **more,
        }

    def message(self, status: str) -> dict:
        content = [{"type": "output_text", "text": self.text, "annotations": []}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "status": status}
        return {**message, "content": content if self.text else []}

    def begin(self) -> bytes:
        item = self.message("in_progress")
        created = self.event("response.created", response=self.response("in_progress", []))
        return created + self.event("response.output_item.added", output_index=0, item=item)

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                self.text += text
                place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
                return self.event("response.output_text.delta", **place, delta=text, logprobs=[])
            case Finish(reason):
                usage = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
                usage["input_tokens_details"] = {"cached_tokens": 0}
                usage["output_tokens_details"] = {"reasoning_tokens": 0}
                status, more = "completed", {"usage": usage}
                if reason == "length":
                    status, more = "incomplete", {"reason": "max_output_tokens"}
                    more = {"incomplete_details": more}
                item = self.message(status)
                done = self.event("response.output_item.done", output_index=0, item=item)
                response = self.response(status, [item], **more)
                return done + self.event(f"response.{status}", response=response)

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        if isinstance(body["input"], str):
            return [("user", body["input"])]
        messages = [{"role": "tool", **item} for item in body["input"]]
        return OpenAI.messages({"messages": messages})

    @staticmethod
    def instructions(body: dict) -> str:
        return body.get("instructions", "")


# ---- What single servers refuse, beside their format ----------------------------


def alternating(body: dict) -> Refusal | None:
    """vLLM with a chat template as Mistral's or Gemma's. Calls and outputs do not count."""
    messages = [message for message in body["messages"] if message["role"] != "system"]
    roles = [m["role"] for m in messages if m["role"] != "tool" and not m.get("tool_calls")]
    if all(role == ("user", "assistant")[number % 2] for number, role in enumerate(roles)):
        return None
    words = "After the optional system message, conversation roles must alternate user/assistant"
    return 400, error(f"{words}/user/assistant/...", 400, "BadRequestError")


def strings(body: dict) -> Refusal | None:
    """Servers whose messages are strings."""
    for number, message in enumerate(body["messages"]):
        if isinstance(message.get("content"), list):
            place = ["body", "messages", number, "content"]
            fault = {"type": "string_type", "loc": place, "msg": "Input should be a valid string"}
            return 422, {"detail": [{**fault, "input": message["content"]}]}
    return None


def groq(body: dict) -> Refusal | None:
    for number, message in enumerate(body["messages"]):
        place, role = f"messages.{number}", message["role"]
        fault = ""
        if isinstance(message.get("content"), list) and role in ("system", "assistant"):
            fault = f"'{place}.content' : value must be a string"
        if "reasoning_content" in message:
            fault = f"'{place}' : property 'reasoning_content' is unsupported"
        if fault:
            words = f"for 'role:{role}' the following must be satisfied"
            return 400, error(f"'{place}' : {words}[({fault})]")
    return None


def mistral(body: dict) -> Refusal | None:
    def refused(message: Any, type: str, code: str | None, status: int = 400) -> Refusal:
        fault = {"object": "error", "message": message, "type": type}
        return status, {**fault, "param": None, "code": code}

    order = "invalid_request_message_order"
    known = {"role", "content", "tool_calls", "tool_call_id", "name", "prefix"}
    previous = ""
    for number, message in enumerate(body["messages"]):
        role, calls = message["role"], message.get("tool_calls") or []
        for name in set(message) - known:
            fault = {"type": "extra_forbidden", "loc": ["body", "messages", number, role, name]}
            fault["msg"] = "Extra inputs are not permitted"
            return refused({"detail": [fault]}, "invalid_request_error", None, 422)
        for id in [message.get("tool_call_id"), *(call["id"] for call in calls)]:
            if id and not re.fullmatch("[a-zA-Z0-9]{9}", id):
                words = f"Tool call id was {id} but must be a-z, A-Z, 0-9, with a length of 9."
                return refused(words, "invalid_function_call", "3280")
        if role == "user" and previous == "tool":
            return refused("Unexpected role 'user' after role 'tool'", order, "3230")
        if role == "assistant" and not calls and is_blank(message.get("content")):
            words = "Assistant message must have either content or tool_calls, but not none."
            return refused(words, "invalid_request_assistant_message", "3240")
        previous = role
    if previous not in ("user", "tool"):
        words = "Expected last role User or Tool (or Assistant with prefix True) for serving"
        return refused(f"{words} but got {previous}", order, "3230")
    if OpenAI.check(body):
        return refused("Not the same number of function calls and responses", order, "3230")
    return None


def without_reasoning(body: dict) -> int | None:
    """The number of a message with calls and without reasoning, though the model thinks."""
    thinks = not re.match("deepseek-chat|moonshot-v1", body["model"])
    if not thinks or body.get("thinking") == {"type": "disabled"}:
        return None
    for number, message in enumerate(body["messages"]):
        if message.get("tool_calls") and not message.get("reasoning_content"):
            return number
    return None


def deepseek(body: dict) -> Refusal | None:
    if without_reasoning(body) is None:
        return None
    words = "The `reasoning_content` in the thinking mode must be passed back to the API."
    return 400, error(words, "invalid_request_error")


def kimi(body: dict) -> Refusal | None:
    number = without_reasoning(body)
    if number is None:
        return None
    words = "thinking is enabled but reasoning_content is missing in assistant tool call message"
    return 400, error(f"{words} at index {number}")


# By the first part of the path. A test may change `provider.rules`; it is reset after each.
RULES: dict[str, tuple[Callable[[dict], Refusal | None], ...]] = {
    "openai": (),
    "openrouter": (),
    "own": (),  # for OPENAI_BASE_URL
    "groq": (groq,),
    "mistral": (mistral,),
    "deepseek": (deepseek,),
    "moonshot": (kimi,),
    "vllm": (alternating,),
}

# ---- Whole answers of single servers --------------------------------------------


def quota(period: str, limit: int) -> dict:
    """Gemini's quotas differ in the details only."""
    metric = "generativelanguage.googleapis.com/generate_content_free_tier_requests"
    id = f"GenerateRequestsPer{period}PerProjectPerModel-FreeTier"
    google = "type.googleapis.com/google.rpc"
    violations = [{"quotaMetric": metric, "quotaId": id}]
    details = [{"@type": f"{google}.QuotaFailure", "violations": violations}]
    details += [{"@type": f"{google}.RetryInfo", "retryDelay": "34s"}]
    words = "You exceeded your current quota, please check your plan and billing details."
    words += f"\n* Quota exceeded for metric: {metric}, limit: {limit}\nPlease retry in 34.07s."
    fault = {"code": 429, "message": words, "status": "RESOURCE_EXHAUSTED", "details": details}
    return {"error": fault}


def plain(message: str, code: Any) -> dict:
    return {"error": {"message": message, "code": code}}


UNEXPECTED = "Unexpected endpoint or method. (POST /chat/completions)"
NO_DEPLOYMENT = "The API deployment for this resource does not exist."
NO_ACCESS = "You don't have access to the model with the specified model ID."
PAGE = "<html>\n<body>\n<h1>Log in to the network</h1>\n</body>\n</html>"
BODIES: dict[str, tuple[int, dict | str]] = {  # kind: the status, the body
    "html": (200, PAGE),  # a captive portal, or LM Studio
    "json": (200, {"hello": "world"}),
    "endpoint": (200, {"error": UNEXPECTED}),  # LM Studio
    "no-route": (404, {"detail": "Not Found"}),  # vLLM, for a base URL without /v1
    "no-page": (404, "404 page not found"),  # the same of servers in Go
    "no-tools": (404, plain("No endpoints found that support tool use.", 404)),  # OpenRouter
    "data-policy": (404, plain("No endpoints found matching your data policy", 404)),
    "deployment": (404, plain(NO_DEPLOYMENT, "DeploymentNotFound")),  # Azure
    "access": (403, plain("Access denied due to Virtual Network rules.", "AccessDenied")),  # Azure
    "access-bedrock": (403, {"message": NO_ACCESS, "__type": "AccessDeniedException"}),
    "day": (429, quota("Day", 0)),  # Gemini
    "minute": (429, quota("Minute", 15)),
}

# ---- The server -----------------------------------------------------------------


@dataclass
class Seen:
    """One request as the provider saw it; `closed` is set when its answer is over,
    `complete` says whether all of it was sent."""

    format: type
    body: dict
    headers: dict
    path: str
    closed: threading.Event = field(default_factory=threading.Event)
    complete: bool = False

    @property
    def key(self) -> str:
        names = ("x-goog-api-key", "x-api-key", "authorization", "api-key")
        keys = [self.headers[name] for name in names if name in self.headers]
        return keys[0].removeprefix("Bearer ") if keys else ""

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
        self.asked = threading.Event()
        self.answer = answer
        self.per_second = per_second
        self.keep = True
        self.app = FastAPI()
        for route, format in {
            "/gemini/models/{model}:streamGenerateContent": Gemini,
            "/gemini/models/{model}:generateContent": Gemini,
            "/anthropic/v1/messages": Anthropic,
            "/ollama/api/chat": Ollama,
            "/openai/responses": Responses,
            # OpenAI's route, and Azure's: openai/deployments/{model}/chat/completions
            **{f"/{name}/{{path:path}}chat/completions": OpenAI for name in RULES},
        }.items():
            self.app.add_route(route, partial(self.respond, format), ["POST"])

    def reset(self):
        """As it was at the start."""
        self.script.clear()
        self.requests.clear()
        self.refused.clear()
        self.rules.update(RULES)
        self.asked.clear()

    async def respond(self, format, request: Request):
        seen = Seen(format, await request.json(), dict(request.headers), str(request.url))
        if self.keep:
            self.requests.append(seen)
            self.asked.set()
        server = request.url.path.split("/")[1]
        for check in (*self.rules.get(server, ()), format.check):
            if refusal := check(seen.body):
                self.refused.append((request.url.path, json.dumps(refusal[1])))
                seen.closed.set()
                return JSONResponse(refusal[1], refusal[0])
        message = seen.message
        replies = self.script.get(message) or [self.answer(message)]
        steps = replies.pop(0) if len(replies) > 1 else replies[0]
        writer = format(seen.body)
        writer.thought = {"openrouter": "reasoning", "groq": "reasoning"}.get(
            server, OpenAI.thought
        )
        writer.ids = {"mistral": "{}"}.get(server, OpenAI.ids)
        match steps:
            case [Body() as body, *_]:
                return StreamingResponse(self.send(body, seen), body.status, media_type=body.type)
            case [Failure() as failure, *_]:
                seen.closed.set()
                return self.fail(failure, writer, seen)
            case [Reset(), *_]:
                seen.closed.set()
                return Broken()
        if not (seen.body.get("stream") or "stream" in seen.path):
            return await self.complete(writer, steps, seen)
        return StreamingResponse(self.stream(writer, steps, seen), media_type=format.type)

    def fail(self, failure: Failure, writer, seen: Seen):
        kind, headers = failure.kind, failure.headers
        if kind in BODIES:
            status, body = BODIES[kind]
        else:  # some providers repeat the key
            status = writer.errors[kind][0]
            body = writer.error(kind, f" The key was {seen.key}." if kind == "key" else "")
        if isinstance(body, str):
            type = "text/html" if body is PAGE else "text/plain"
            return Response(body, failure.status or status, headers, type)
        return JSONResponse(body, failure.status or status, headers)

    async def send(self, body: Body, seen: Seen):
        try:
            for piece in body.pieces:
                yield piece if isinstance(piece, bytes) else json.dumps(piece).encode()
                await asyncio.sleep(0.005)  # otherwise two pieces may arrive as one
            if body.cut:
                raise ConnectionError("cut on purpose")
            seen.complete = True
        finally:
            seen.closed.set()

    async def complete(self, writer, steps: list, seen: Seen):
        """The texts of the steps in one piece."""
        texts = []
        for step in steps:
            match step:
                case Text(text):
                    texts.append(text)
                case Silence():
                    await self.silence(step)
                case _:
                    raise NotImplementedError(step)
        seen.closed.set()
        seen.complete = True
        return JSONResponse(writer.complete("".join(texts)))

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
                    case Together(parts):
                        yield b"".join(map(writer.step, parts))
                    case _:
                        finished = finished or isinstance(step, (Finish, Stream))
                        yield writer.step(step)
            if not finished and not (steps and isinstance(steps[-1], Raw)):
                yield writer.step(Finish())
            seen.complete = True
        finally:
            seen.closed.set()

    def open(self) -> list[Seen]:
        """The requests whose answers are still under way."""
        return [seen for seen in self.requests if not seen.closed.is_set()]

    def environment(self) -> dict[str, str]:
        """The variables that point LiteLLM at this provider, with keys that work here."""
        servers = {"OPENROUTER": "openrouter", "DEEPSEEK": "deepseek", "GROQ": "groq"}
        servers |= {"HOSTED_VLLM": "vllm", "MOONSHOT": "moonshot"}
        keys = ("GEMINI", "OPENAI", "ANTHROPIC", "AZURE", *servers)
        return {
            "GEMINI_API_BASE": f"{self.url}/gemini",
            "OPENAI_BASE_URL": f"{self.url}/openai",
            "ANTHROPIC_API_BASE": f"{self.url}/anthropic",
            "OLLAMA_API_BASE": f"{self.url}/ollama",
            "AZURE_API_BASE": self.url,
            "MISTRAL_AZURE_API_BASE": f"{self.url}/mistral",  # LiteLLM's only name for it
            **{f"{name}_API_BASE": f"{self.url}/{path}" for name, path in servers.items()},
            **{f"{name}_API_KEY": f"{name.lower()}-key-0123456789" for name in keys},
        }

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Not uvloop: as this process's policy it keeps playwright on Python < 3.12 from starting.
        config = uvicorn.Config(self.app, loop="asyncio", **OPTIONS)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


# Uvicorn's 5 seconds are about what passes between two tests: a connection could be closed as it
# is used again.
OPTIONS = {"log_level": "critical", "lifespan": "off", "timeout_keep_alive": 600}


class Now(Text):
    """A text delta that holds the time at which it is sent, in seconds."""

    text = property(lambda self: f"{time.time():.6f} ")

    def __init__(self):
        pass


if __name__ == "__main__":
    port, deltas, per_second = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    provider = Provider(lambda _: [Now()] * deltas, per_second)
    provider.keep = False
    uvicorn.run(provider.app, host="127.0.0.1", port=port, **OPTIONS)
