# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "fastapi==0.115.6",
#     "uvicorn[standard]==0.32.1",
#     "openai-chatkit==1.4.0",
#     "openai-agents[litellm]==0.20.0",
#     "litellm==1.106.2",
#     "python-dotenv==1.0.1",
# ]
# ///
"""A ChatKit server: OpenAI's ChatKit in front of any model that LiteLLM supports.

Run it   make run                  with the tested versions in backend/constraints.txt
         uv run backend/main.py    with the versions listed above; a copy of this file is enough
         python backend/main.py    with the versions that you have installed
         PROVIDER=mock             set this for canned replies: no key, no network

Routes   POST /chatkit             ChatKit's protocol: JSON, or a stream of server-sent events
         GET  /health              {"status": "ok"}
         GET  /debug/threads       {thread id: {"items": [{"id", "type", "content"?}], "count"}}

Settings PROVIDER, MODEL, MODEL_TIMEOUT, GEMINI_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY, HOST, PORT,
         ALLOWED_ORIGINS, CHATKIT_TOKENS: in the environment or in .env; see .env.example

Limits   threads are kept in memory, by one process; the model sees the newest HISTORY_ITEMS items of a thread;
         a request body has at most MAX_BODY_BYTES

Several functions below work around faults of the libraries. README.md lists each, with the test that fails without it.
"""

import asyncio
import gc
import json
import logging
import os
import secrets
import signal
import sys
import time
import warnings
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from dotenv import load_dotenv

ROOT_DIR = Path(__file__).resolve().parent.parent
load_dotenv(ROOT_DIR / ".env")
# Both are read at import. Otherwise LiteLLM downloads its price map, and openai-agents uploads traces of every chat.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "true")
gc.disable()  # the imports create 400,000 objects: collecting garbage meanwhile takes a third of the startup time

import anyio
import litellm
from agents import Agent, ModelBehaviorError, ModelRefusalError, ModelSettings, Runner, RunResultStreaming
from agents import InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered
from agents.extensions.models.litellm_model import LitellmModel
from chatkit.agents import AgentContext, ThreadItemConverter, stream_agent_response
from chatkit.errors import CustomStreamError, ErrorCode
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import (
    AssistantMessageContent, AssistantMessageItem, Attachment, ChatKitReq, ErrorEvent, Page, ProgressUpdateEvent,
    StreamOptionsEvent, ThreadItem, ThreadItemDoneEvent, ThreadItemRemovedEvent, ThreadMetadata, ThreadStreamEvent,
    UserMessageInput, UserMessageItem, UserMessageTagContent, is_streaming_req)  # fmt: skip
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, PositiveFloat, TypeAdapter, ValidationError, conint
from starlette.requests import ClientDisconnect

gc.freeze()  # keeps full collections from scanning those objects again: a twentieth of a stream's CPU time
gc.enable()

# ---- Settings --------------------------------------------------------------------------------------------------------

INSTRUCTIONS = "You are a helpful assistant."
MOCK_REPLY = "This is a canned reply from PROVIDER=mock. Set PROVIDER and its key to talk to a model."
HISTORY_ITEMS = 100  # the model sees this many of a thread's newest items
MAX_BODY_BYTES = 4 * 1024 * 1024
SILENCE_SECONDS = 15  # an idle stream sends a heartbeat after this time; many proxies close it after 60
SHUTDOWN_SECONDS = 5  # running chats may go on for this long after SIGTERM


def setting(name: str, default: str, kind: type = str):
    """Return the environment variable as `kind`; a blank one counts as unset. An invalid one stops the start."""
    try:
        return TypeAdapter(kind).validate_python(os.getenv(name, "").strip() or default)
    except ValidationError as error:
        raise SystemExit(f"{name}={os.environ[name]!r}: {error.errors()[0]['msg']}.") from None


PROVIDER = setting("PROVIDER", "gemini").lower()
MODEL = setting("MODEL", "auto")
MODEL_TIMEOUT = setting("MODEL_TIMEOUT", "120", PositiveFloat)  # seconds without a chunk from the model
HOST = setting("HOST", "0.0.0.0")
PORT = setting("PORT", "8000", conint(gt=0, lt=65_536))
ALLOWED_ORIGINS = [origin.strip() for origin in setting("ALLOWED_ORIGINS", "*").split(",")]
tokens = setting("CHATKIT_TOKENS", "").replace(" ", "")
USERS = [entry.split(":") for entry in tokens.split(",")] if tokens else []
TOKENS = {entry[-1]: entry[0] for entry in USERS}  # token -> user
if len(TOKENS) < len(USERS) or not all(len(entry) == 2 and all(entry) for entry in USERS):
    raise SystemExit("CHATKIT_TOKENS is not of the form user:token,user:token, each token once.")
logger = logging.getLogger("uvicorn.error")  # the logger that uvicorn shows

# ---- Store -----------------------------------------------------------------------------------------------------------

TYPES = {"Thread": TypeAdapter(ThreadMetadata), "Item": TypeAdapter(ThreadItem), "Attachment": TypeAdapter(Attachment)}


class Table(dict[str, tuple[int, bytes]]):
    """Rows by id, each with its number and its JSON, so that callers never share an object with the store.

    A row's number is its place in the order of addition and never changes, so a binary search finds it: a page takes
    as long with 100,000 rows as with 100. Raises NotFoundError for an unknown id.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.ids = kind, []  # the ids in the order of their numbers

    def __missing__(self, id: str):
        raise NotFoundError(f"{self.kind} {id} not found")

    def index(self, id: str) -> int:
        return bisect_left(self.ids, self[id][0], key=lambda id: self[id][0])

    def load(self, id: str):
        return TYPES[self.kind].validate_json(self[id][1])

    def save(self, row: BaseModel) -> None:
        """Add the row, or replace the one with its id in place."""
        if row.id not in self:
            self[row.id] = self[self.ids[-1]][0] + 1 if self.ids else 0, b""
            self.ids.append(row.id)
        self[row.id] = self[row.id][0], TYPES[self.kind].dump_json(row)

    def delete(self, id: str) -> None:
        if id in self:
            del self.ids[self.index(id)], self[id]

    def page(self, after: str | None, limit: int, order: str) -> Page:
        places = range(len(self.ids))[:: 1 if order == "asc" else -1]
        start = places.index(self.index(after)) + 1 if after else 0
        ids, more = [self.ids[place] for place in places[start : start + limit]], start + limit < len(places)
        return Page(data=[self.load(id) for id in ids], has_more=more, after=ids[-1] if more else None)


class MemoryStore(Store[dict]):
    """chatkit's Store in memory: replace this class to use a database (tests/test_store.py is its contract).

    The context is {} or {"user_id": ...}: users see their own threads and attachments only. Raises NotFoundError for
    what is missing, but a missing thread has an empty page of items, and deleting twice is allowed, as in chatkit.
    """

    def __init__(self) -> None:
        self._threads: dict[str, Table] = {}  # thread id -> its items
        self._tables: dict[tuple, Table] = {}  # (kind, user) -> that user's threads or attachments

    def _table(self, kind: str, context: dict) -> Table:
        return self._tables.setdefault((kind, context.get("user_id")), Table(kind))

    def _items(self, thread_id: str, context: dict) -> Table:
        self._table("Thread", context)[thread_id]  # raises NotFoundError
        return self._threads[thread_id]

    def generate_thread_id(self, context: dict) -> str:
        return self.generate_item_id("thread", None, context)

    def generate_item_id(self, item_type: StoreItemType, thread: ThreadMetadata | None, context: dict) -> str:
        # chatkit's 32-bit ids collide after about 77,000 threads. These have its prefixes and 128 random bits.
        return f"{default_generate_id(item_type).split('_')[0]}_{secrets.token_hex(16)}"

    async def load_thread(self, thread_id: str, context: dict) -> ThreadMetadata:
        return self._table("Thread", context).load(thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: dict) -> None:
        if thread.id in self._threads:
            self._items(thread.id, context)  # raises NotFoundError if it belongs to another user
        self._threads.setdefault(thread.id, Table("Item"))
        self._table("Thread", context).save(thread)

    async def load_threads(self, limit: int, after: str | None, order: str, context: dict) -> Page[ThreadMetadata]:
        return self._table("Thread", context).page(after, limit, order)

    async def delete_thread(self, thread_id: str, context: dict) -> None:
        if thread_id in self._table("Thread", context):
            self._table("Thread", context).delete(thread_id)
            del self._threads[thread_id]

    async def load_thread_items(self, thread_id: str, after: str | None, limit: int, order: str, context: dict) -> Page:
        known = thread_id in self._table("Thread", context)
        return self._threads[thread_id].page(after, limit, order) if known else Page()

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: dict) -> None:
        self._items(thread_id, context).save(item)

    save_item = add_thread_item  # both add an item or replace it in place

    async def load_item(self, thread_id: str, item_id: str, context: dict) -> ThreadItem:
        return self._items(thread_id, context).load(item_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: dict) -> None:
        with suppress(NotFoundError):
            self._items(thread_id, context).delete(item_id)

    async def save_attachment(self, attachment: Attachment, context: dict) -> None:
        self._table("Attachment", context).save(attachment)

    async def load_attachment(self, attachment_id: str, context: dict) -> Attachment:
        return self._table("Attachment", context).load(attachment_id)

    async def delete_attachment(self, attachment_id: str, context: dict) -> None:
        self._table("Attachment", context).delete(attachment_id)


# ---- Model -----------------------------------------------------------------------------------------------------------

# What MODEL=auto selects. The template's gemini-2.0-flash and claude-3-sonnet-20240229 have been shut down.
DEFAULT_MODELS = dict(gemini="gemini-flash-latest", openai="gpt-4o", anthropic="claude-sonnet-4-6", mock="gpt-4o")


def litellm_name(provider: str, model: str) -> str:
    """Return LiteLLM's name for the model, "provider/model". Stops the start with one line if there is none."""
    if provider not in (DEFAULT_MODELS if model == "auto" else [*DEFAULT_MODELS, *litellm.provider_list]):
        raise SystemExit(f"PROVIDER={provider!r} is none of {', '.join(DEFAULT_MODELS)}. Any other needs MODEL, too.")
    prefix = "openai" if provider == "mock" else provider
    return f"{prefix}/{(DEFAULT_MODELS[provider] if model == 'auto' else model).removeprefix(prefix + '/')}"


for name in [name for name in os.environ if name.endswith("_API_KEY") and not os.environ[name].strip()]:
    del os.environ[name]  # LiteLLM would use a blank key
litellm.suppress_debug_info = True  # no "Give Feedback / Get Help" in the log
litellm.REPEATED_STREAMING_CHUNK_LIMIT = float("inf")  # LiteLLM ends a stream after 100 equal chunks: a long table rule
# This finalizer sets context variables. Before Python 3.12 it may run inside ContextVar.set and crash the process.
litellm.CustomStreamWrapper.__del__ = lambda stream: None
# LiteLLM prepares a request in a thread. A client that leaves meanwhile makes Python warn: nobody awaits the result.
warnings.filterwarnings("ignore", r"coroutine '\S*(async_streaming|acompletion\w*)' was never awaited", RuntimeWarning)
MODEL_NAME = litellm_name(PROVIDER, MODEL)
needed = [] if PROVIDER == "mock" else litellm.validate_environment(MODEL_NAME)["missing_keys"]
MISSING_KEY = next((name for name in reversed(needed) if name.endswith("_API_KEY")), None)


class EmptyReply(Exception):
    """A turn ended without a text, a tool call or anything else that the user can see."""


# The faults of a turn that are raised outside the model. A tool's own errors are none: chatkit logs them.
GUARDRAILS = InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered
TURN_FAULTS = EmptyReply, ModelBehaviorError, ModelRefusalError, *GUARDRAILS
FAULTS = [  # HTTP statuses and exception classes; the message in the chat; whether a retry may help
    ({401, 403}, f"The AI provider refused the key. Check {PROVIDER.upper()}_API_KEY.", False),
    ({404}, f"The AI provider does not know the model {MODEL_NAME}. Check MODEL.", False),
    ({429}, "The AI provider's rate limit is reached. Wait a moment and try again.", True),
    ({413, litellm.ContextWindowExceededError}, "This conversation is too long. Start a new thread.", False),
    ({litellm.ContentPolicyViolationError, ModelRefusalError}, "The AI provider's content filter stopped this.", False),
    ({*GUARDRAILS}, "This server's rules do not allow this. Rephrase your message.", False),
    ({408, TimeoutError}, "The AI provider timed out: it sent nothing for too long. Try again.", True),
    ({ConnectionResetError}, "The reply was cut off: the AI provider dropped the connection. Try again.", True),
    ({ModelBehaviorError, StopAsyncIteration}, "The AI provider's answer was not understood. Try again.", True),
    ({EmptyReply}, "The AI provider's reply was empty. Try again.", True),
    ({*range(500, 600)}, "The AI provider is unavailable. Try again later.", True),
    ({*range(400, 500)}, "The AI provider refused this request. Start a new thread.", False),
]


class ProviderFault(CustomStreamError):
    """A fault with a message for the person in the chat."""

    # Otherwise openai-agents raises an error before it has passed on the deltas that preceded it.
    _agents_drain_queued_stream_events = True


@contextmanager
def faults_explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn those of `errors` that FAULTS lists into a ProviderFault, and log the cause. Others pass unchanged."""
    try:
        yield
    except errors as error:
        cause, causes = error, set()
        while cause:  # LiteLLM wraps errors, and the status is not always on the outermost
            causes |= {getattr(cause, "status_code", None), *type(cause).__mro__}
            causes |= {ConnectionResetError} if getattr(cause, "generated_content", "") else set()
            cause = cause.__cause__ or cause.__context__
        text = " ".join(str(error).split())
        for key in [value for name, value in os.environ.items() if name.endswith("_API_KEY")]:
            text = text.replace(key, "***")  # some providers repeat it
        for fault, message, allow_retry in FAULTS:
            if fault & causes:
                logger.error("%s (%s: %.500s)", message, type(error).__name__, text)
                raise ProviderFault(message, allow_retry=allow_retry) from error
        raise


class ProviderModel(LitellmModel):
    """LitellmModel with a time limit, readable faults, and a ProviderStream."""

    async def _fetch_response(self, *args, **kwargs):
        if MISSING_KEY:
            raise ProviderFault(f"This server has no {MISSING_KEY}. Set it, or try PROVIDER=mock.")
        with faults_explained(Exception), anyio.fail_after(MODEL_TIMEOUT):
            fetched = await super()._fetch_response(*args, **kwargs)
        return (fetched[0], ProviderStream(fetched[1], self.model)) if kwargs.get("stream") else fetched


class ProviderStream(AsyncIterator[litellm.ModelResponseStream]):
    """The chunks of a reply. Raises ProviderFault if one takes too long, or if the stream ends too early."""

    def __init__(self, stream: litellm.CustomStreamWrapper, model: str) -> None:
        self.stream, self.model = stream, model

    async def __anext__(self) -> litellm.ModelResponseStream:
        # LiteLLM returns buffered chunks without yielding to the event loop: a fast reply would block all other chats.
        await asyncio.sleep(0)
        try:
            with faults_explained(Exception), anyio.fail_after(MODEL_TIMEOUT):
                async for chunk in self.stream:
                    return chunk
                self.check_end()
        except asyncio.CancelledError:  # close it at once, or the exception keeps the connection's frames in a cycle
            await asyncio.shield(self.aclose())
            raise
        raise StopAsyncIteration

    def check_end(self) -> None:
        """Raise unless the provider gave a reason for the end: LiteLLM takes the end of any response for one."""
        finish_reason = self.stream.received_finish_reason or self.stream.intermittent_finish_reason
        if finish_reason == "content_filter":
            raise litellm.ContentPolicyViolationError(finish_reason, self.model, PROVIDER)
        if finish_reason is None:
            raise (ConnectionResetError if self.stream.response_uptil_now else ModelBehaviorError)("it ended too early")

    async def aclose(self) -> None:
        """Close the provider's connection; openai-agents calls this. LiteLLM leaves Anthropic's open, so find it."""
        lines = getattr(self.stream.completion_stream, "streaming_response", None)
        await self.stream.aclose()
        if hasattr(lines, "aclose"):
            await lines.aclose()


# LiteLLM's canned replies have no finish reason, so check_end would refuse them.
model = (LitellmModel if PROVIDER == "mock" else ProviderModel)(model=MODEL_NAME)

# ---- Server ----------------------------------------------------------------------------------------------------------

REQUEST = TypeAdapter(ChatKitReq)
Events = AsyncIterator[ThreadStreamEvent]
# The methods that you have to write to support an operation, and the type of the item that an operation is about.
METHODS = {"custom_action": "action", "sync_custom_action": "sync_action", "transcribe": "transcribe"}
ITEM_TYPES = {"threads.retry_after_item": "user_message", "threads.add_structured_input": "structured_input"}


class Converter(ThreadItemConverter):
    """chatkit's conversion of thread items to the model's input, with two gaps closed."""

    async def assistant_message_to_input(self, item: AssistantMessageItem):
        # chatkit makes `output_text` parts, which openai-agents cannot convert for LiteLLM ("Unknown content"): the
        # second message of every conversation would fail.
        text = "".join(part.text for part in item.content)
        return {"type": "message", "role": "assistant", "content": text} if text else None

    async def tag_to_message_content(self, tag: UserMessageTagContent):
        return {"type": "input_text", "text": f"{tag.text}: {json.dumps({'id': tag.id, **tag.data})}"}


class RunEvents:
    """The events of a run, as stream_agent_response reads them, each awaited by a task.

    chatkit's _merge_generators abandons that task when the client leaves; unless somebody looks at its result, asyncio
    logs "Task exception was never retrieved".
    """

    def __init__(self, result: RunResultStreaming) -> None:
        self.events = result.stream_events()

    def stream_events(self) -> "RunEvents":
        return self

    def __anext__(self) -> asyncio.Future:
        task = asyncio.ensure_future(anext(self.events))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task


class ChatKitServerImpl(ChatKitServer[dict]):
    def __init__(self, store: Store[dict]) -> None:
        super().__init__(store)
        options = {"mock_response": MOCK_REPLY} if PROVIDER == "mock" else {"max_retries": 0}
        # Log lines count the tokens. LiteLLM refuses `stream_options`, which asks for them, for two providers.
        settings = ModelSettings(include_usage=PROVIDER not in ("bytez", "oci"), extra_args=options)
        self.agent = Agent[AgentContext]("Assistant", instructions=INSTRUCTIONS, model=model, model_settings=settings)

    async def process(self, request: bytes, context: dict) -> StreamingResult | NonStreamingResult:
        """Answer a request. Raises HTTPException (400) or NotFoundError before anything is stored."""
        try:
            parsed = REQUEST.validate_json(request)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise HTTPException(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")[:300]) from None
        await self.check(parsed, context)
        if parsed.type in ("threads.delete", "threads.retry_after_item"):
            await self.stop_turns(parsed.params.thread_id)
        # Not super().process(): it builds the TypeAdapter again for every request, which takes 20 ms.
        if is_streaming_req(parsed):
            return StreamingResult(self._process_streaming(parsed, context))
        return NonStreamingResult(await self._process_non_streaming(parsed, context))

    async def check(self, request: ChatKitReq, context: dict) -> None:
        """Refuse what chatkit would answer with a 500, a broken stream or an empty one."""

        def require(condition: object, reason: str) -> None:
            if not condition:
                raise HTTPException(400, reason)

        kind, params = request.type, dict(request.params)
        require(METHODS.get(kind.partition(".")[2]) in {None, *vars(type(self))}, f"{kind} is not supported.")
        require(self.attachment_store or not kind.startswith("attachments."), "Attachments are not configured.")
        require((params.get("limit") or 1) > 0, "limit must be at least 1.")
        thread_id, item_id = params.get("thread_id"), params.get("item_id")
        item_type = "widget" if kind.endswith("custom_action") else ITEM_TYPES.get(kind)
        if thread_id is not None:
            await self.store.load_thread(thread_id, context)
        for id in params.get("item_ids", [] if item_id is None else [item_id]):
            item = await self.store.load_item(thread_id, id, context)
            require(item_type in {None, item.type}, f"Item {id} is not a {item_type}.")
            require(item_type != "structured_input" or item.status == "pending", f"Item {id} is not pending.")
        if kind == "threads.add_client_tool_output":
            newest = (await self.store.load_thread_items(thread_id, None, 1, "desc", context)).data
            pending = newest and newest[0].type == "client_tool_call" and newest[0].status == "pending"
            require(pending, "No client tool call is pending in this thread.")
        if isinstance(message := params.get("input"), UserMessageInput):
            require(message_text(message) or message.attachments, "The message is empty.")
            for attachment_id in message.attachments:
                await self.store.load_attachment(attachment_id, context)

    async def stop_turns(self, thread_id: str) -> None:
        """Stop the thread's turns in this process, and wait until what they streamed is stored."""
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_name() == thread_id:
                task.cancel()
                await asyncio.wait([task], timeout=SHUTDOWN_SECONDS)

    async def respond(self, thread: ThreadMetadata, input: UserMessageItem | None, context: dict) -> Events:
        """Stream the agent's reply to the thread, in which chatkit has stored `input`. Raises CustomStreamError."""
        if thread.title is None and input:
            thread.title = message_text(input)[:60] or None
            # After this event chatkit saves the title. Later the thread may have been deleted, and would come back.
            yield StreamOptionsEvent(stream_options=self.get_stream_options(thread, context))
        asyncio.current_task().set_name(thread.id)  # for stop_turns
        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        result = Runner.run_streamed(self.agent, await self.history(thread, context), context=agent_context)
        events = stream_agent_response(agent_context, RunEvents(result))
        # Each stage is a function further down, with one idea; it works, and can be deleted, without the others.
        for stage in (with_unique_ids, with_reply, with_unfinished_items, with_log_line, with_cancellation):
            events = stage(events, agent_context, result)
        with faults_explained(*TURN_FAULTS):
            async with aclosing(events):
                async for event in events:
                    yield event

    async def history(self, thread: ThreadMetadata, context: dict) -> list:
        """The model's input: the newest items of the thread, oldest first, starting with a user message."""
        items = (await self.store.load_thread_items(thread.id, None, HISTORY_ITEMS, "desc", context)).data[::-1]
        # Some providers refuse a conversation that starts with the assistant.
        start = next((number for number, item in enumerate(items) if item.type == "user_message"), 0)
        return await Converter().to_agent_input(items[start:])

    async def handle_stream_cancelled(self, thread: ThreadMetadata, pending_items: list, context: dict) -> None:
        """Store what was streamed when the client stopped or left: reasoning here, text in chatkit."""
        asyncio.current_task().set_name(thread.id)  # for stop_turns
        # Starlette cancels every await that follows, hence the shield. The thread may have been deleted meanwhile.
        with anyio.CancelScope(shield=True), suppress(NotFoundError):
            for item in [item for item in pending_items if item.type == "workflow"]:
                await self.store.add_thread_item(thread.id, item, context)
            await super().handle_stream_cancelled(thread, pending_items, context)


# ---- The stages of a turn: its events pass through these generators, in the order in which respond lists them.


async def with_unique_ids(events: Events, agent_context: AgentContext, result: RunResultStreaming) -> Events:
    """Give each message and client tool call an id of its own.

    Through LiteLLM all of them have openai-agents' placeholder `__fake_id__`, and each would overwrite the one before.
    Items whose id comes from the store (workflows, widgets) keep it.
    """
    id_mapping: dict[str, list[str]] = {}  # the model's id -> ours, newest last
    async for event in events:
        if event.type == "thread.item.added" and event.item.type == "assistant_message":
            id_mapping.setdefault(event.item.id, []).append(agent_context.generate_id("message"))
            event.item.id = id_mapping[event.item.id][-1]
        elif event.type == "thread.item.updated" and event.item_id in id_mapping:
            event.item_id = id_mapping[event.item_id][-1]
        elif event.type == "thread.item.done" and event.item.type == "client_tool_call":
            event.item.id = agent_context.generate_id("tool_call")
        elif event.type == "thread.item.done" and event.item.id in id_mapping:
            event.item.id = id_mapping[event.item.id][-1]
        elif event.type == "thread.item.removed" and event.item_id in {"__fake_id__", *id_mapping}:  # by a guardrail
            for new_id in id_mapping.get(event.item_id, []):
                yield ThreadItemRemovedEvent(item_id=new_id)
            continue
        yield event


async def with_reply(events: Events, agent_context: AgentContext, result: RunResultStreaming) -> Events:
    """Raise EmptyReply if a turn completes nothing but reasoning."""
    answered = False
    async for event in events:
        answered = answered or (event.type == "thread.item.done" and event.item.type != "workflow")
        yield event
    if not answered:
        raise EmptyReply


class StreamedMessage(AssistantMessageItem):
    """A message that chatkit extends in place. It would copy the message for each delta."""

    content: list[AssistantMessageContent]  # the same, but pydantic cannot build the class without it

    def model_copy(self, **_) -> "StreamedMessage":
        return self


async def with_unfinished_items(events: Events, agent_context: AgentContext, result: RunResultStreaming) -> Events:
    """Complete the items that an error interrupts, so that chatkit stores what was streamed of them."""
    unfinished = {}  # by id
    try:
        async for event in events:
            if event.type == "thread.item.added":
                if event.item.type == "assistant_message":
                    event.item = StreamedMessage(**dict(event.item))
                unfinished[event.item.id] = event.item
            elif event.type in ("thread.item.done", "thread.item.removed"):
                unfinished.pop(event.item.id if event.type == "thread.item.done" else event.item_id, None)
            yield event
    except Exception:
        for item in unfinished.values():
            yield ThreadItemDoneEvent(item=item)
        raise


async def with_cancellation(events: Events, agent_context: AgentContext, result: RunResultStreaming) -> Events:
    """Cancel the run when the turn is over: otherwise the provider would generate, and bill, the rest of the reply."""
    try:
        async for event in events:
            yield event
    finally:
        asyncio.current_task().set_name("")
        result.cancel()
        # One more event, which nobody reads, ends the queue getter that chatkit's _merge_generators leaves behind
        # ("Task was destroyed but it is pending!").
        await agent_context.stream(ProgressUpdateEvent(text=""))


TURN = "turn pid=%s thread=%s provider=%s model=%s end=%s first_delta=%s total=%s input_tokens=%s output_tokens=%s"


async def with_log_line(events: Events, agent_context: AgentContext, result: RunResultStreaming) -> Events:
    """Log one line per turn. Tokens: the sum of the model's completed responses, "-" if the provider does not say."""
    started, first_delta = time.monotonic(), "-"
    try:
        async for event in events:
            if first_delta == "-" and event.type == "thread.item.updated":
                first_delta = f"{time.monotonic() - started:.3f}s"
            yield event
    finally:
        total, error, usage = f"{time.monotonic() - started:.3f}s", sys.exc_info()[0], result.context_wrapper.usage
        end = "done" if error is None else "stopped" if error is asyncio.CancelledError else "fault"
        tokens = usage.input_tokens or "-", usage.output_tokens or "-"
        logger.info(TURN, os.getpid(), agent_context.thread.id, PROVIDER, MODEL_NAME, end, first_delta, total, *tokens)


def message_text(message: UserMessageItem | UserMessageInput) -> str:
    """Return what the user typed, on one line."""
    return " ".join(" ".join(part.text for part in message.content).split())


# ---- Routes ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    logger.info("PROVIDER=%s, model %s", PROVIDER, MODEL_NAME)
    if MISSING_KEY:
        logger.warning("%s is not set: every chat gets an error. PROVIDER=mock needs no key.", MISSING_KEY)
    if not TOKENS:
        logger.warning("CHATKIT_TOKENS is not set: anyone who can reach this port can read every thread.")
    yield


app = FastAPI(title="ChatKit Server", lifespan=lifespan)
app.add_middleware(CORSMiddleware, allow_origins=ALLOWED_ORIGINS, allow_credentials=True,
                   allow_methods=["*"], allow_headers=["*"])  # fmt: skip
app.add_exception_handler(NotFoundError, lambda request, error: JSONResponse({"detail": str(error)}, 404))
app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=400))

store = MemoryStore()
server = ChatKitServerImpl(store)
HEARTBEAT = b"data: %s\n\n" % ProgressUpdateEvent(text="Still working…").model_dump_json().encode()
STREAM_ERROR = b"data: %s\n\n" % ErrorEvent(code=ErrorCode.STREAM_ERROR, allow_retry=True).model_dump_json().encode()


async def request_context(bearer: HTTPAuthorizationCredentials | None = Depends(HTTPBearer(auto_error=False))) -> dict:
    """Return the context that the Store receives: who is asking. Put your own login here.

    {"user_id": ...} for a token in CHATKIT_TOKENS; {} if that is not set. Raises HTTPException (401).
    """
    given = bearer.credentials.encode() if bearer else b""
    users = [user for token, user in TOKENS.items() if secrets.compare_digest(token.encode(), given)]
    if TOKENS and not users:
        raise HTTPException(401, "A valid bearer token is needed.", headers={"WWW-Authenticate": "Bearer"})
    return {"user_id": users[0]} if users else {}


async def request_body(request: Request) -> bytes:
    """Return the body. Raises HTTPException (413) as soon as it exceeds MAX_BODY_BYTES."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes.")
    return bytes(body)


class EventStream(StreamingResponse):
    """chatkit's events, with a heartbeat while none comes, and an error event if chatkit fails.

    When the client disconnects, Starlette cancels this task wherever it waits. While it sends, chatkit would not be
    told, and would not store what was streamed: the shield puts the cancellation off until it waits for chatkit.
    """

    async def stream_response(self, send) -> None:
        async def shielded_send(message: dict) -> None:
            self.last_sent = time.monotonic()
            with anyio.CancelScope(shield=True):
                await send(message)

        heartbeat = asyncio.create_task(self.send_heartbeats(shielded_send))
        try:
            await super().stream_response(shielded_send)
        except (Exception, asyncio.CancelledError):  # chatkit has logged it; it sends events for a turn's errors only
            await shielded_send({"type": "http.response.body", "body": STREAM_ERROR})
        finally:
            heartbeat.cancel()

    async def send_heartbeats(self, send) -> None:
        while True:
            await asyncio.sleep(self.last_sent + SILENCE_SECONDS - time.monotonic())
            if time.monotonic() >= self.last_sent + SILENCE_SECONDS:
                await send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})


@app.post("/chatkit")
async def chatkit_endpoint(request: Request, context: dict = Depends(request_context)):
    result = await server.process(await request_body(request), context)
    if isinstance(result, StreamingResult):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventStream(result, media_type="text/event-stream", headers=headers)
    return Response(content=result.json, media_type="application/json")


@app.get("/health")
async def health():
    return {"status": "ok"}


async def all_rows(load_page: Callable[[str | None], Awaitable[Page]]) -> AsyncIterator:
    """Yield the rows of every page; load_page(after) loads one page."""
    page = Page(has_more=True)
    while page.has_more:
        page = await load_page(page.after)
        for row in page.data:
            yield row


# Debug endpoint to inspect stored items
@app.get("/debug/threads")
async def debug_threads(context: dict = Depends(request_context)):
    result, load_items = {}, server.store.load_thread_items
    async for thread in all_rows(lambda after: server.store.load_threads(100, after, "asc", context)):
        items = []
        async for item in all_rows(lambda after: load_items(thread.id, after, 100, "asc", context)):
            items.append({"id": item.id, "type": type(item).__name__})
            if getattr(item, "content", None):
                items[-1]["content"] = [part.text for part in item.content if hasattr(part, "text")]
        result[thread.id] = {"items": items, "count": len(items)}
    return result


# ---- Start -----------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    import uvicorn

    # uvicorn raises SIGTERM again after its shutdown, and the exit code would not be 0.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # One worker, whatever WEB_CONCURRENCY says: each worker would have a memory of its own.
    uvicorn.run(app, host=HOST, port=PORT, workers=1, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
