"""ChatKit server: OpenAI's ChatKit in front of any model that LiteLLM reaches.

Run it:  make run                      (or: python backend/main.py)
         make run PROVIDER=mock        (canned replies: no key, no network)

Routes:  POST /chatkit         the ChatKit protocol; JSON, or a stream of server-sent events
         GET  /health          {"status": "ok"}
         GET  /debug/threads   {thread id: {"items": [{"id", "type", "content"?}], "count"}}

Environment (or .env beside backend/; the environment wins; .env.example explains each):
         PROVIDER, MODEL, MODEL_TIMEOUT, GEMINI_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY,
         HOST, PORT, ALLOWED_ORIGINS, CHATKIT_TOKENS

Limits:  threads live in the memory of this one process and end with it; the model sees
         the newest HISTORY_ITEMS items of a thread; a request is at most MAX_BODY_BYTES.
"""

import asyncio
import gc
import json
import logging
import os
import secrets
import signal
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import version
from itertools import dropwhile
from pathlib import Path

import anyio
from dotenv import load_dotenv
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

ROOT_DIR = Path(__file__).resolve().parent.parent
load_dotenv(ROOT_DIR / ".env")
# Read by the imports below. LiteLLM fetches its price map from the internet, openai-agents
# uploads traces of prompts and replies to OpenAI: both only where the environment asks for it.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "true")

import litellm
from agents import Agent, ModelSettings, Runner, RunResultStreaming
from agents.exceptions import (
    InputGuardrailTripwireTriggered,
    ModelBehaviorError,
    ModelRefusalError,
    OutputGuardrailTripwireTriggered,
)
from agents.extensions.models.litellm_model import LitellmModel
from chatkit.agents import AgentContext, ThreadItemConverter, stream_agent_response
from chatkit.errors import CustomStreamError, ErrorCode
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import (
    AssistantMessageContent,
    AssistantMessageItem,
    Attachment,
    ChatKitReq,
    ClientToolCallItem,
    ErrorEvent,
    Page,
    ProgressUpdateEvent,
    ThreadItem,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemRemovedEvent,
    ThreadItemUpdatedEvent,
    ThreadMetadata,
    ThreadStreamEvent,
    UserMessageInput,
    UserMessageItem,
    UserMessageTagContent,
    WorkflowItem,
    is_streaming_req,
)

# ---- Settings -------------------------------------------------------------------

HISTORY_ITEMS = 100  # how many of a thread's newest items the model sees
MAX_BODY_BYTES = 4 * 1024 * 1024
TITLE_CHARACTERS = 60
SILENCE_SECONDS = 15  # proxies cut a stream that is idle for 60
SHUTDOWN_SECONDS = 5  # how long running chats may go on after SIGTERM

INSTRUCTIONS = "You are a helpful assistant."
MOCK_REPLY = "This is a canned reply from PROVIDER=mock. Set PROVIDER and its key to talk to a model."


def setting(name: str, default: str) -> str:
    """The variable's value; a blank one counts as unset."""
    return os.getenv(name, "").strip() or default


def number(name: str, default: str, kind: type, highest: int):
    """The variable as `kind`, above 0. Stops the start with one line when it is none."""
    try:
        value = kind(setting(name, default))
    except ValueError:
        value = 0
    if not 0 < value <= highest:
        raise SystemExit(f"{name}={setting(name, default)!r} is not a number from 1 to {highest}.")
    return value


def parse_tokens(value: str) -> dict[str, str]:
    """{token: user id} of "alice:token1,bob:token2". Stops the start when malformed."""
    users = {}
    for entry in filter(None, value.split(",")):
        user, _, token = (part.strip() for part in entry.partition(":"))
        if not user or not token or token in users:
            raise SystemExit("CHATKIT_TOKENS is not of the form user:token,user:token, each token once.")
        users[token] = user
    return users


PROVIDER = setting("PROVIDER", "gemini").lower()
MODEL = setting("MODEL", "auto")
MODEL_TIMEOUT = number("MODEL_TIMEOUT", "120", float, 86_400)  # seconds without a sign of the model
HOST = setting("HOST", "0.0.0.0")
PORT = number("PORT", "8000", int, 65_535)
ALLOWED_ORIGINS = [origin.strip() for origin in setting("ALLOWED_ORIGINS", "*").split(",")]
TOKENS = parse_tokens(setting("CHATKIT_TOKENS", ""))

logger = logging.getLogger("uvicorn.error")  # the one that uvicorn prints without further ado


# ---- Store ----------------------------------------------------------------------


class Rows:
    """JSON rows by id, in the order in which they were first put.

    Numbers only grow, so the place of an id is found by bisection: a page costs the
    same however many rows there are.
    """

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, bytes]] = {}  # id -> (number, row)
        self._ids: list[str] = []  # by number

    def __iter__(self) -> Iterator[bytes]:
        return (self._rows[id][1] for id in self._ids)

    def get(self, id: str) -> bytes | None:
        return self._rows[id][1] if id in self._rows else None

    def put(self, id: str, row: bytes) -> None:
        """Add a row, or replace it where it stands."""
        if id in self._rows:
            number = self._rows[id][0]
        else:
            number = self._rows[self._ids[-1]][0] + 1 if self._ids else 0
            self._ids.append(id)
        self._rows[id] = number, row

    def remove(self, id: str) -> None:
        if id in self._rows:
            del self._ids[self._place(id, bisect_left)]
            del self._rows[id]

    def page(self, after: str | None, limit: int, order: str) -> tuple[list[bytes], str | None]:
        """At most `limit` rows beyond the row `after`, and the last one's id if there are more.

        Raises KeyError for an unknown `after`.
        """
        limit = max(limit, 1)
        if order == "desc":
            stop = self._place(after, bisect_left) if after else len(self._ids)
            ids = self._ids[max(stop - limit, 0) : stop][::-1]
            more = stop > limit
        else:
            start = self._place(after, bisect_right) if after else 0
            ids = self._ids[start : start + limit]
            more = start + limit < len(self._ids)
        return [self._rows[id][1] for id in ids], ids[-1] if more else None

    def _place(self, id: str, bisect) -> int:
        return bisect(self._ids, self._rows[id][0], key=lambda id: self._rows[id][0])


THREAD = TypeAdapter(ThreadMetadata)
ITEM: TypeAdapter[ThreadItem] = TypeAdapter(ThreadItem)
ATTACHMENT: TypeAdapter[Attachment] = TypeAdapter(Attachment)


class ThreadState:
    """A thread's owner and its items."""

    def __init__(self, owner: str | None) -> None:
        self.owner = owner
        self.rows = Rows()

    @property
    def items(self) -> list[ThreadItem]:
        return [ITEM.validate_json(row) for row in self.rows]


class MemoryStore(Store[dict]):
    """chatkit's Store, in memory: the class to replace by a database.

    Rows are kept as JSON, as a database would, so nothing stored is shared with a caller.
    The request context is {} or {"user_id": ...}; each user sees their own threads and
    attachments only. Missing ones raise NotFoundError, and so does an unknown cursor; the
    items of a missing thread are an empty page; deleting what is not there does nothing.
    `tests/test_store.py` is this contract as a test suite.
    """

    def __init__(self) -> None:
        self._threads: dict[str, ThreadState] = {}
        self._threads_of: defaultdict[str | None, Rows] = defaultdict(Rows)
        self._attachments: dict[tuple[str | None, str], bytes] = {}

    # chatkit's own ids have 32 random bits: at 77 000 threads one overwrites another.
    def generate_thread_id(self, context: dict) -> str:
        return unique_id("thread")

    def generate_item_id(self, item_type: StoreItemType, thread: ThreadMetadata, context: dict) -> str:
        return unique_id(item_type)

    async def load_thread(self, thread_id: str, context: dict) -> ThreadMetadata:
        row = self._threads_of[owner(context)].get(thread_id)
        if row is None:
            raise NotFoundError(f"Thread {thread_id} not found")
        return THREAD.validate_json(row)

    async def save_thread(self, thread: ThreadMetadata, context: dict) -> None:
        state = self._threads.setdefault(thread.id, ThreadState(owner(context)))
        if state.owner != owner(context):
            raise NotFoundError(f"Thread {thread.id} not found")
        # chatkit also hands over whole Threads: their items have rows of their own.
        self._threads_of[state.owner].put(thread.id, dump(thread, exclude={"items"}))

    async def load_threads(self, limit: int, after: str | None, order: str, context: dict) -> Page[ThreadMetadata]:
        return load_page(self._threads_of[owner(context)], THREAD, "Thread", after, limit, order)

    async def delete_thread(self, thread_id: str, context: dict) -> None:
        if self._visible(thread_id, context):
            del self._threads[thread_id]
            self._threads_of[owner(context)].remove(thread_id)

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: dict
    ) -> Page[ThreadItem]:
        if not self._visible(thread_id, context):
            return Page()
        return load_page(self._threads[thread_id].rows, ITEM, "Item", after, limit, order)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: dict) -> None:
        self._rows(thread_id, context).put(item.id, dump(item))

    async def save_item(self, thread_id: str, item: ThreadItem, context: dict) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def load_item(self, thread_id: str, item_id: str, context: dict) -> ThreadItem:
        row = self._rows(thread_id, context).get(item_id)
        if row is None:
            raise NotFoundError(f"Item {item_id} not found")
        return ITEM.validate_json(row)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: dict) -> None:
        if self._visible(thread_id, context):
            self._threads[thread_id].rows.remove(item_id)

    async def save_attachment(self, attachment: Attachment, context: dict) -> None:
        self._attachments[owner(context), attachment.id] = dump(attachment)

    async def load_attachment(self, attachment_id: str, context: dict) -> Attachment:
        row = self._attachments.get((owner(context), attachment_id))
        if row is None:
            raise NotFoundError(f"Attachment {attachment_id} not found")
        return ATTACHMENT.validate_json(row)

    async def delete_attachment(self, attachment_id: str, context: dict) -> None:
        self._attachments.pop((owner(context), attachment_id), None)

    def _visible(self, thread_id: str, context: dict) -> bool:
        return thread_id in self._threads and self._threads[thread_id].owner == owner(context)

    def _rows(self, thread_id: str, context: dict) -> Rows:
        if not self._visible(thread_id, context):
            raise NotFoundError(f"Thread {thread_id} not found")
        return self._threads[thread_id].rows


def owner(context: dict | None) -> str | None:
    return (context or {}).get("user_id")


def unique_id(item_type: StoreItemType) -> str:
    """chatkit's prefix for the type, then 128 random bits."""
    return f"{default_generate_id(item_type).partition('_')[0]}_{secrets.token_hex(16)}"


def dump(model, **options) -> bytes:
    return model.model_dump_json(**options).encode()


def load_page(rows: Rows, adapter: TypeAdapter, name: str, after: str | None, limit: int, order: str) -> Page:
    try:
        found, last = rows.page(after, limit, order)
    except KeyError:
        raise NotFoundError(f"{name} {after} not found") from None
    return Page(data=[adapter.validate_json(row) for row in found], has_more=last is not None, after=last)


# ---- Model ----------------------------------------------------------------------

# What MODEL=auto stands for. The template's gemini-2.0-flash and claude-3-sonnet are shut down.
DEFAULT_MODELS = {
    "gemini": "gemini-flash-latest",
    "openai": "gpt-4o",
    "anthropic": "claude-sonnet-4-6",
    "mock": "gpt-4o",
}


def litellm_model(provider: str, model: str) -> str:
    """LiteLLM's name for the model, provider/model. Stops the start when there is none."""
    if provider not in DEFAULT_MODELS and provider not in litellm.provider_list:
        raise SystemExit(
            f"PROVIDER={provider!r} is unknown: use {', '.join(DEFAULT_MODELS)}, "
            "or, with MODEL, any other of https://docs.litellm.ai/docs/providers."
        )
    if model == "auto":
        if provider not in DEFAULT_MODELS:
            raise SystemExit(f"PROVIDER={provider} has no default model: set MODEL.")
        model = DEFAULT_MODELS[provider]
    prefix = "openai" if provider == "mock" else provider
    return f"{prefix}/{model.removeprefix(prefix + '/')}"


def missing_key(provider: str, model: str) -> str | None:
    """The name of the API key variable that the provider needs and the environment lacks."""
    for name in [name for name in os.environ if name.endswith("_API_KEY") and not os.environ[name].strip()]:
        del os.environ[name]  # left blank, as in .env.example; LiteLLM would send it
    if provider == "mock":
        return None
    names = litellm.validate_environment(model)["missing_keys"]
    return next((name for name in reversed(names) if name.endswith("_API_KEY")), None)


# openai-agents from 0.22 on comes with LiteLLM 1.83: newer ones want an older openai. It takes a
# connection that broke for the end of the reply, unless its transport is httpx's.
OLD_LITELLM = tuple(map(int, version("litellm").split(".")[:2])) < (1, 106)
litellm.disable_aiohttp_transport = OLD_LITELLM
litellm.suppress_debug_info = True  # no "Give Feedback / Get Help" in the log
MODEL_ID = litellm_model(PROVIDER, MODEL)
MISSING_KEY = missing_key(PROVIDER, MODEL_ID)
KEY_NAME = f"{PROVIDER.upper()}_API_KEY"


class BrokenReply(Exception):
    """The stream of a reply ended before the reply did."""


class NotAReply(Exception):
    """The provider answered, but not with a stream of its kind."""


class EmptyReply(Exception):
    """A turn ended without a text, a tool call or anything else to see."""


FAULTS = [  # exceptions, HTTP statuses, what the person in the chat reads, whether a retry may help
    (
        (litellm.AuthenticationError,),
        {401, 403},
        f"The AI provider refused this server's API key. Check {KEY_NAME}.",
        False,
    ),
    (
        (litellm.NotFoundError,),
        {404},
        f"The AI provider does not know the model {MODEL_ID}. Check MODEL.",
        False,
    ),
    (
        (litellm.RateLimitError,),
        {429},
        "The AI provider is limiting requests. Wait a moment and try again.",
        True,
    ),
    (
        (litellm.ContextWindowExceededError,),
        {413},
        "This conversation is too long for the model. Start a new thread.",
        False,
    ),
    (
        (litellm.ContentPolicyViolationError, ModelRefusalError),
        set(),
        "The AI provider's content filter stopped this reply. Put it differently.",
        False,
    ),
    (
        (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered),
        set(),
        "This server's rules do not allow this reply. Put it differently.",
        False,
    ),
    (
        (TimeoutError, litellm.Timeout),
        {408},
        "The AI provider took too long to answer: it timed out. Try again.",
        True,
    ),
    (
        (BrokenReply,),
        set(),
        "The reply was cut off: the connection to the AI provider broke. Try again.",
        True,
    ),
    (
        (NotAReply, ModelBehaviorError),
        set(),
        "The AI provider's answer was not understood. Try again.",
        True,
    ),
    (
        (EmptyReply,),
        set(),
        "The AI provider's reply was empty. Try again.",
        True,
    ),
    (
        (litellm.APIConnectionError,),
        set(range(500, 600)),
        "The AI provider is unavailable. Try again later.",
        True,
    ),
    (
        (litellm.BadRequestError,),
        set(range(400, 500)),
        "The AI provider refused this request. Start a new thread.",
        False,
    ),
]


class ProviderFault(CustomStreamError):
    """A fault of the provider's, in words for the person in the chat."""

    # openai-agents raises an error ahead of the deltas that came before it, unless it says so.
    _agents_drain_queued_stream_events = True


def explain(error: Exception) -> Exception:
    """The ProviderFault that an error amounts to; logs the cause.

    Any other error is returned as it is: chatkit logs its traceback and shows a general message.
    """
    if isinstance(error, CustomStreamError):
        return error
    for types, statuses, message, allow_retry in FAULTS:
        # LiteLLM wraps errors, and the status that tells is not always the outermost.
        cause = error
        while cause is not None:
            if isinstance(cause, types) or getattr(cause, "status_code", None) in statuses:
                logger.error("%s (%s: %s)", message, type(cause).__name__, redact(str(cause)))
                return ProviderFault(message, allow_retry=allow_retry)
            cause = cause.__cause__ or cause.__context__
    return error


@contextmanager
def explained() -> Iterator[None]:
    """Errors inside come out as what they amount to in the chat."""
    try:
        yield
    except Exception as error:
        fault = explain(error)
        if fault is error:
            raise
        raise fault from error


def redact(text: str) -> str:
    """The text on one line, without any API key of the environment."""
    for name, value in os.environ.items():
        if name.endswith("_API_KEY"):
            text = text.replace(value, "***")
    return " ".join(text.split())[:500]


class ProviderModel(LitellmModel):
    """LitellmModel whose faults are explained and whose streams are fair, timed and complete."""

    async def _fetch_response(self, *args, **kwargs):
        with explained(), anyio.fail_after(MODEL_TIMEOUT):
            fetched = await super()._fetch_response(*args, **kwargs)
        if not kwargs.get("stream"):
            return fetched
        response, stream = fetched
        if OLD_LITELLM and stream.make_call:
            stream.make_call = finite(stream.make_call)
        return response, self._chunks(stream)

    async def _chunks(self, stream: litellm.CustomStreamWrapper) -> AsyncIterator[litellm.ModelResponseStream]:
        with explained():
            try:
                while True:
                    with anyio.fail_after(MODEL_TIMEOUT):
                        chunk = await anext(stream, None)
                    if chunk is None:
                        break
                    # LiteLLM hands over what it has buffered without a pause: with a fast provider
                    # no other chat gets a turn, and this one is not sent, before the reply's end.
                    await asyncio.sleep(0)
                    yield chunk
            except litellm.exceptions.MidStreamFallbackError as error:
                if error.is_pre_first_chunk:
                    raise
                raise BrokenReply(error) from error
            finally:
                await asyncio.shield(close(stream))
            finish_reason = stream.received_finish_reason or stream.intermittent_finish_reason
            if finish_reason == "content_filter":
                raise litellm.ContentPolicyViolationError(finish_reason, self.model, PROVIDER)
            if finish_reason is None:  # LiteLLM takes the end of the body for the end of the reply
                raise BrokenReply if stream.response_uptil_now else NotAReply


async def close(stream: litellm.CustomStreamWrapper) -> None:
    """Close the provider's connection. Of Anthropic's LiteLLM closes nothing: its lines hold the connection."""
    lines = getattr(stream.completion_stream, "streaming_response", None)
    await stream.aclose()
    if hasattr(lines, "aclose"):
        await lines.aclose()


def finite(make_call):
    """`make_call` without the None that the old LiteLLM's Gemini parser returns for ever after a web page."""

    async def chunks(**kwargs) -> AsyncIterator:
        nothing = 0
        async for chunk in await make_call(**kwargs):
            nothing = nothing + 1 if chunk is None else 0
            if nothing > 10_000:
                return
            if chunk is not None:
                yield chunk

    async def call(**kwargs) -> AsyncIterator:
        return chunks(**kwargs)

    return call


model = (LitellmModel if PROVIDER == "mock" else ProviderModel)(model=MODEL_ID)


# ---- Server ---------------------------------------------------------------------

REQUEST: TypeAdapter[ChatKitReq] = TypeAdapter(ChatKitReq)

# The method that a user of this file writes before the operation can be served.
HANDLERS = {
    "threads.custom_action": "action",
    "threads.sync_custom_action": "sync_action",
    "input.transcribe": "transcribe",
}
# The type of the item that the operation is about.
ITEM_TYPES = {
    "threads.retry_after_item": "user_message",
    "threads.custom_action": "widget",
    "threads.sync_custom_action": "widget",
    "threads.add_structured_input": "structured_input",
}


class Converter(ThreadItemConverter):
    """chatkit's converter from thread items to the model's input, with two gaps closed."""

    async def assistant_message_to_input(self, item: AssistantMessageItem):
        # chatkit makes `output_text` parts, which openai-agents refuses on every path through
        # LiteLLM ("Unknown content"): the second message of a conversation would fail.
        text = "".join(part.text for part in item.content)
        return {"type": "message", "role": "assistant", "content": text} if text else None

    async def tag_to_message_content(self, tag: UserMessageTagContent):
        return {"type": "input_text", "text": f"{tag.text}: {json.dumps({'id': tag.id, **tag.data})}"}


class RunEvents:
    """A run for stream_agent_response, which can be cancelled while it waits for an event.

    chatkit's _merge_generators then forgets the task that waits, and asyncio complains of its
    outcome ("Task exception was never retrieved"). So this makes the task, and looks at it.
    """

    def __init__(self, result: RunResultStreaming) -> None:
        self.result = result
        self.events = result.stream_events()

    def stream_events(self) -> "RunEvents":
        return self

    def __anext__(self) -> asyncio.Future:
        self.next = asyncio.ensure_future(anext(self.events))
        return self.next

    def cancel(self) -> None:
        """End the run, or the provider goes on, and is paid, to the end of the reply."""
        self.next.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.result.cancel()


class ChatKitServerImpl(ChatKitServer[dict]):
    def __init__(self, store: Store[dict]) -> None:
        super().__init__(store)
        self.converter = Converter()
        self.agent = Agent[AgentContext](
            name="Assistant",
            instructions=INSTRUCTIONS,
            model=model,
            model_settings=ModelSettings(
                extra_args={"mock_response": MOCK_REPLY} if PROVIDER == "mock" else {"max_retries": 0}
            ),
        )

    async def process(self, request: bytes, context: dict):
        """chatkit's answer to a request. Raises HTTPException (400) or NotFoundError before anything is stored."""
        try:
            parsed = REQUEST.validate_json(request)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise HTTPException(400, f"{place}: {problem['msg']}"[:300].removeprefix(": ")) from None
        await self.check(parsed, context)
        # Not super().process(): it makes the TypeAdapter anew, some 20 ms, for every request.
        if is_streaming_req(parsed):
            return StreamingResult(self._process_streaming(parsed, context))
        return NonStreamingResult(await self._process_non_streaming(parsed, context))

    async def check(self, request: ChatKitReq, context: dict) -> None:
        """Refuse what chatkit answers with a 500, with a broken stream, or with nothing at all."""
        params = request.params
        handler = HANDLERS.get(request.type)
        if handler and getattr(type(self), handler) is getattr(ChatKitServer, handler):
            raise HTTPException(400, f"{request.type} is not supported by this server.")
        if request.type.startswith("attachments.") and self.attachment_store is None:
            raise HTTPException(400, "Attachments are not configured on this server.")
        if (getattr(params, "limit", None) or 0) < 0:
            raise HTTPException(400, "limit must be at least 1.")

        thread_id = getattr(params, "thread_id", None)
        if thread_id is not None:
            await self.store.load_thread(thread_id, context)
        if request.type == "threads.add_client_tool_output":
            newest = await self.store.load_thread_items(thread_id, None, 1, "desc", context)
            if not any(item.type == "client_tool_call" and item.status == "pending" for item in newest.data):
                raise HTTPException(400, "No client tool call is pending in this thread.")
        for item_id in getattr(params, "item_ids", [getattr(params, "item_id", None)]):
            if item_id is not None:
                item = await self.store.load_item(thread_id, item_id, context)
                if item.type != ITEM_TYPES.get(request.type, item.type):
                    raise HTTPException(400, f"Item {item_id} is not a {ITEM_TYPES[request.type]}.")
                if request.type == "threads.add_structured_input" and item.status != "pending":
                    raise HTTPException(400, f"Item {item_id} is not pending.")
        message = getattr(params, "input", None)
        for attachment_id in getattr(message, "attachments", []):
            await self.store.load_attachment(attachment_id, context)
        if message and not message_text(message) and not message.attachments:
            raise HTTPException(400, "The message is empty.")

    async def respond(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: dict
    ) -> AsyncIterator[ThreadStreamEvent]:
        """Stream the agent's reply to the thread, whose newest item `input` is, if there is one.

        What was shown of a reply that fails is stored. Raises CustomStreamError with a message
        for the person in the chat.
        """
        if thread.title is None and input:  # chatkit saves a changed thread and tells the client
            thread.title = message_text(input)[:TITLE_CHARACTERS] or None
        if MISSING_KEY:
            raise CustomStreamError(f"Set {MISSING_KEY} on the server, or try it with PROVIDER=mock.")

        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        result = Runner.run_streamed(self.agent, await self.history(thread, context), context=agent_context)
        run = RunEvents(result)
        events = self.with_unique_ids(stream_agent_response(agent_context, run), thread, context)
        unfinished: dict[str, ThreadItem] = {}
        texts: defaultdict[str, str] = defaultdict(str)
        answered = False
        with explained():
            try:
                async for event in events:
                    if event.type == "thread.item.added":
                        unfinished[event.item.id] = event.item
                    elif event.type == "thread.item.updated":
                        texts[event.item_id] += getattr(event.update, "delta", "")
                    elif event.type == "thread.item.done":
                        unfinished.pop(event.item.id, None)
                        answered = answered or event.item.type != "workflow"
                    elif event.type == "thread.item.removed":
                        unfinished.pop(event.item_id, None)
                    yield event
                if not answered:
                    raise EmptyReply
            except Exception:
                for item in unfinished.values():
                    if isinstance(item, AssistantMessageItem):
                        item.content = [AssistantMessageContent(text=texts[item.id])]
                    if isinstance(item, AssistantMessageItem | WorkflowItem):
                        yield ThreadItemDoneEvent(item=item)
                raise
            finally:
                run.cancel()
                # chatkit's _merge_generators leaves a queue getter behind; one more event ends it.
                await agent_context.stream(ProgressUpdateEvent(text=""))

    async def with_unique_ids(
        self, events: AsyncIterator[ThreadStreamEvent], thread: ThreadMetadata, context: dict
    ) -> AsyncIterator[ThreadStreamEvent]:
        """The events of one turn, each message and client tool call under an id of its own.

        Through LiteLLM every one of them carries openai-agents' placeholder `__fake_id__`, and
        stored under it the next overwrites the last. Items that took an id from the store
        (workflows, widgets) keep it.
        """
        id_mapping: defaultdict[str, list[str]] = defaultdict(list)  # an id of the model's -> ours, oldest first
        async for event in events:
            match event:
                case ThreadItemAddedEvent(item=AssistantMessageItem() as item):
                    new_id = self.store.generate_item_id("message", thread, context)
                    id_mapping[item.id].append(new_id)
                    item.id = new_id
                case ThreadItemUpdatedEvent(item_id=old_id) if old_id in id_mapping:
                    event.item_id = id_mapping[old_id][-1]
                case ThreadItemDoneEvent(item=AssistantMessageItem(id=old_id) as item) if old_id in id_mapping:
                    item.id = id_mapping[old_id][-1]
                case ThreadItemDoneEvent(item=ClientToolCallItem(id="__fake_id__") as item):
                    item.id = self.store.generate_item_id("tool_call", thread, context)
                case ThreadItemRemovedEvent(item_id="__fake_id__" as old_id):  # a guardrail tripped
                    for new_id in id_mapping[old_id]:
                        yield ThreadItemRemovedEvent(item_id=new_id)
                    continue
            yield event

    async def history(self, thread: ThreadMetadata, context: dict) -> list:
        """The model's input: the thread's newest items, oldest first, from a user message on."""
        page = await self.store.load_thread_items(thread.id, None, HISTORY_ITEMS, "desc", context)
        items = page.data[::-1]
        # Some providers refuse a conversation that starts with the assistant.
        from_user = list(dropwhile(lambda item: item.type != "user_message", items))
        return await self.converter.to_agent_input(from_user or items)

    async def handle_stream_cancelled(
        self, thread: ThreadMetadata, pending_items: list[ThreadItem], context: dict
    ) -> None:
        """Store what was shown when the client stopped the stream or went away: chatkit the text, this the thoughts."""
        with suppress(NotFoundError):  # the thread was deleted meanwhile
            for item in pending_items:
                if isinstance(item, WorkflowItem):
                    await self.store.add_thread_item(thread.id, item, context)
            await super().handle_stream_cancelled(thread, pending_items, context)


def message_text(message: UserMessageItem | UserMessageInput) -> str:
    """What the user typed, on one line."""
    return " ".join(" ".join(part.text for part in message.content).split())


# ---- Routes ---------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    logger.info("Model: %s", MODEL_ID if PROVIDER != "mock" else "canned replies (PROVIDER=mock)")
    if MISSING_KEY:
        logger.warning("%s is not set: chats get an error until it is. PROVIDER=mock needs none.", MISSING_KEY)
    if not TOKENS:
        logger.warning("CHATKIT_TOKENS is not set: anyone who can reach this port can read every thread.")
    # The imports' half a million objects are here to stay: keep the garbage collector off them.
    gc.collect()
    gc.freeze()
    yield


app = FastAPI(title="ChatKit Server", lifespan=lifespan)
app.add_middleware(
    CORSMiddleware,
    allow_origins=ALLOWED_ORIGINS,
    allow_credentials=True,
    allow_methods=["*"],
    allow_headers=["*"],
)

store = MemoryStore()
server = ChatKitServerImpl(store)


def request_context(request: Request) -> dict:
    """Who is asking, as every Store method receives it: put your own login here.

    {"user_id": ...} for a request with one of CHATKIT_TOKENS, {} where there are none.
    Raises HTTPException (401) for any other request.
    """
    if not TOKENS:
        return {}
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    matches = [
        user for token, user in TOKENS.items() if secrets.compare_digest(token.encode(), given.strip().encode())
    ]
    if scheme.lower() != "bearer" or not matches:
        raise HTTPException(401, "A valid bearer token is required.", headers={"WWW-Authenticate": "Bearer"})
    return {"user_id": matches[0]}


async def request_body(request: Request) -> bytes:
    """The body. Raises HTTPException (413) as soon as it is longer than MAX_BODY_BYTES."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes.")
    except ClientDisconnect:
        raise HTTPException(400, "The request broke off.") from None
    return bytes(body)


def sse(event: ThreadStreamEvent) -> bytes:
    return b"data: " + event.model_dump_json(exclude_none=True).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """chatkit's events, read in a task of their own.

    Starlette drops a response wherever it is when the client leaves, mostly where it sends.
    chatkit stores what was shown, and the run ends, only if the cancellation reaches them
    where they wait for the model: this task waits nowhere else.
    """

    def __init__(self, result: StreamingResult) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self.events(), media_type="text/event-stream", headers=headers)
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.reader = asyncio.create_task(self.read(result))
        self.last_event = 0.0

    async def read(self, result: StreamingResult) -> None:
        loop = asyncio.get_running_loop()
        self.beat(loop)
        try:
            async for event in result:
                self.last_event = loop.time()
                self.queue.put_nowait(event)
        except Exception:  # chatkit has logged it
            self.queue.put_nowait(sse(ErrorEvent(code=ErrorCode.STREAM_ERROR, allow_retry=True)))
        finally:
            self.timer.cancel()
            self.queue.put_nowait(None)

    def beat(self, loop) -> None:
        """Say that the model is still at work after every SILENCE_SECONDS without an event."""
        if 0 < self.last_event <= loop.time() - SILENCE_SECONDS:
            self.last_event = loop.time()
            self.queue.put_nowait(sse(ProgressUpdateEvent(text="Still working…")))
        self.timer = loop.call_at((self.last_event or loop.time()) + SILENCE_SECONDS, self.beat, loop)

    async def events(self) -> AsyncIterator[bytes]:
        while event := await self.queue.get():
            yield event

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reader.cancel()
            await asyncio.wait([self.reader])


@app.exception_handler(NotFoundError)
async def not_found(request: Request, error: NotFoundError):
    return JSONResponse({"detail": str(error)}, status_code=404)


@app.post("/chatkit")
async def chatkit_endpoint(request: Request, context: dict = Depends(request_context)):
    result = await server.process(await request_body(request), context)
    if isinstance(result, StreamingResult):
        return EventStream(result)
    return Response(content=result.json, media_type="application/json")


@app.get("/health")
async def health():
    return {"status": "ok"}


# Debug endpoint to inspect stored items
@app.get("/debug/threads")
async def debug_threads(context: dict = Depends(request_context)):
    result = {}
    for thread_id, state in store._threads.items():
        if state.owner != owner(context):
            continue
        items = []
        for item in state.items:
            item_data = {"id": item.id, "type": type(item).__name__}
            if hasattr(item, "content") and item.content:
                item_data["content"] = [part.text for part in item.content if hasattr(part, "text")]
            items.append(item_data)
        result[thread_id] = {"items": items, "count": len(items)}
    return result


if __name__ == "__main__":
    import uvicorn

    # After its shutdown uvicorn raises the signal again: without a handler the exit code is not 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # One worker, whatever WEB_CONCURRENCY says: each would have a memory of its own.
    uvicorn.run(app, host=HOST, port=PORT, workers=1, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
