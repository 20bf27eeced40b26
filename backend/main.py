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
"""ChatKit server: OpenAI's ChatKit in front of any model that LiteLLM reaches.

Run it   make run                  with the tested versions of backend/constraints.txt
         uv run backend/main.py    with those of the lines above, also of a copy of this file alone
         python backend/main.py    with those that you have installed
         PROVIDER=mock             before any of them: canned replies, no key, no network

Routes   POST /chatkit             ChatKit's protocol: JSON, or a stream of server-sent events
         GET  /health              {"status": "ok"}
         GET  /debug/threads       {thread id: {"items": [{"id", "type", "content"?}], "count"}}

Settings PROVIDER, MODEL, MODEL_TIMEOUT, GEMINI_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY, HOST, PORT,
         ALLOWED_ORIGINS, CHATKIT_TOKENS: in the environment or in .env; .env.example explains each

Limits   threads live in this one process and end with it; the model sees a thread's newest HISTORY_ITEMS items;
         a request has at most MAX_BODY_BYTES

Faults   of the libraries: README.md lists what here works around each, and the test that says if it is still there
"""

import asyncio
import gc
import itertools
import json
import logging
import os
import secrets
import signal
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from dotenv import load_dotenv

ROOT_DIR = Path(__file__).resolve().parent.parent
load_dotenv(ROOT_DIR / ".env")
# Unless told before their import, LiteLLM fetches its price map, and openai-agents uploads traces of all that is said.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "true")
gc.disable()  # searching the imports' 400 000 objects for garbage takes a third of the start

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
    AssistantMessageContent, AssistantMessageItem, Attachment, ChatKitReq, ClientToolCallItem, ErrorEvent, Page,
    ProgressUpdateEvent, ThreadItem, ThreadItemAddedEvent, ThreadItemDoneEvent, ThreadItemRemovedEvent,
    ThreadItemUpdatedEvent, ThreadMetadata, ThreadStreamEvent, UserMessageInput, UserMessageItem,
    UserMessageTagContent, is_streaming_req,
)  # fmt: skip
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field, PositiveFloat, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

gc.freeze()  # and, again and again, a tenth of every stream
gc.enable()

# ---- Settings --------------------------------------------------------------------------------------------------------

INSTRUCTIONS = "You are a helpful assistant."
MOCK_REPLY = "This is a canned reply from PROVIDER=mock. Set PROVIDER and its key to talk to a model."
HISTORY_ITEMS = 100  # how many of a thread's newest items the model sees
TITLE_CHARACTERS = 60
MAX_BODY_BYTES = 4 * 1024 * 1024
SILENCE_SECONDS = 15  # after which the stream says that it is alive: proxies cut one that is idle for 60
SHUTDOWN_SECONDS = 5  # how long running chats may go on after SIGTERM


def setting(name: str, default: str, kind: type = str):
    """The variable as `kind`; a blank one counts as unset. Stops the start with one line if it is none."""
    try:
        return TypeAdapter(kind).validate_python(os.getenv(name, "").strip() or default)
    except ValidationError as error:
        raise SystemExit(f"{name}={os.environ[name]!r}: {error.errors()[0]['msg']}.") from None


PROVIDER = setting("PROVIDER", "gemini").lower()
MODEL = setting("MODEL", "auto")
MODEL_TIMEOUT = setting("MODEL_TIMEOUT", "120", PositiveFloat)  # seconds of a model's silence
HOST = setting("HOST", "0.0.0.0")
PORT = setting("PORT", "8000", Annotated[int, Field(gt=0, lt=65_536)])
ALLOWED_ORIGINS = [origin.strip() for origin in setting("ALLOWED_ORIGINS", "*").split(",")]
tokens = setting("CHATKIT_TOKENS", "").replace(" ", "")
USERS = [entry.split(":") for entry in tokens.split(",")] if tokens else []
TOKENS = {entry[-1]: entry[0] for entry in USERS}  # token -> user
if len(TOKENS) < len(USERS) or not all(len(entry) == 2 and all(entry) for entry in USERS):
    raise SystemExit("CHATKIT_TOKENS is not of the form user:token,user:token, each token once.")
logger = logging.getLogger("uvicorn.error")  # the one that uvicorn shows

# ---- Store -----------------------------------------------------------------------------------------------------------

KINDS = {"Thread": TypeAdapter(ThreadMetadata), "Item": TypeAdapter(ThreadItem), "Attachment": TypeAdapter(Attachment)}
NUMBERS = itertools.count()


class Rows:
    """Rows of one of KINDS as JSON, so that none is shared with a caller, by id and in the order of their first put.

    Their numbers only grow: bisection finds a row's place, so that a page costs the same however many rows there are.
    Raises NotFoundError for an unknown id.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.adapter = kind, KINDS[kind]
        self.rows: dict[str, tuple[int, bytes]] = {}  # id -> (number, JSON)
        self.ids: list[str] = []  # by number

    def find(self, id: str) -> tuple[int, bytes]:
        if id not in self.rows:
            raise NotFoundError(f"{self.kind} {id} not found")
        return self.rows[id]

    def place(self, id: str) -> int:
        return bisect_left(self.ids, self.find(id)[0], key=lambda id: self.rows[id][0])

    def load(self, id: str):
        return self.adapter.validate_json(self.find(id)[1])

    def put(self, row: BaseModel) -> None:
        if row.id not in self.rows:
            self.ids.append(row.id)
        number = self.rows[row.id][0] if row.id in self.rows else next(NUMBERS)
        self.rows[row.id] = number, self.adapter.dump_json(row)

    def remove(self, id: str) -> None:
        if id in self.rows:
            del self.ids[self.place(id)], self.rows[id]

    def page(self, after: str | None, limit: int, order: str) -> Page:
        if order == "desc":
            stop = self.place(after) if after else len(self.ids)
            ids, more = self.ids[max(stop - limit, 0) : stop][::-1], stop > limit
        else:
            start = self.place(after) + 1 if after else 0
            ids, more = self.ids[start : start + limit], start + limit < len(self.ids)
        return Page(data=[self.load(id) for id in ids], has_more=more, after=ids[-1] if more else None)


class MemoryStore(Store[dict]):
    """chatkit's Store in memory: the class to replace by a database (tests/test_store.py is its contract).

    The request context is {} or {"user_id": ...}: each user sees their own threads and attachments only. What is
    missing raises NotFoundError, but a missing thread has an empty page of items, and deletes may be repeated.
    """

    def __init__(self) -> None:
        self._threads: dict[str, Rows] = {}  # thread id -> its items
        self._of_users: dict[tuple, Rows] = {}

    def _rows(self, kind: str, context: dict) -> Rows:
        """The user's threads or attachments."""
        return self._of_users.setdefault((kind, context.get("user_id")), Rows(kind))

    def _items(self, thread_id: str, context: dict) -> Rows:
        self._rows("Thread", context).find(thread_id)
        return self._threads[thread_id]

    def generate_thread_id(self, context: dict) -> str:
        return self.generate_item_id("thread", None, context)

    def generate_item_id(self, item_type: StoreItemType, thread: ThreadMetadata | None, context: dict) -> str:
        # 128 random bits after chatkit's prefix. Of its own 32, two are the same in 77 000 threads as likely as not.
        return f"{default_generate_id(item_type).split('_')[0]}_{secrets.token_hex(16)}"

    async def load_thread(self, thread_id: str, context: dict) -> ThreadMetadata:
        return self._rows("Thread", context).load(thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: dict) -> None:
        if thread.id in self._threads:
            self._items(thread.id, context)  # another user's is not found
        self._threads.setdefault(thread.id, Rows("Item"))
        self._rows("Thread", context).put(thread)

    async def load_threads(self, limit: int, after: str | None, order: str, context: dict) -> Page[ThreadMetadata]:
        return self._rows("Thread", context).page(after, limit, order)

    async def delete_thread(self, thread_id: str, context: dict) -> None:
        if thread_id in self._rows("Thread", context).rows:
            self._rows("Thread", context).remove(thread_id)
            del self._threads[thread_id]

    async def load_thread_items(self, thread_id: str, after: str | None, limit: int, order: str, context: dict) -> Page:
        known = thread_id in self._rows("Thread", context).rows
        return self._threads[thread_id].page(after, limit, order) if known else Page()

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: dict) -> None:
        self._items(thread_id, context).put(item)

    save_item = add_thread_item  # both add an item, or replace the one of its id where it stands

    async def load_item(self, thread_id: str, item_id: str, context: dict) -> ThreadItem:
        return self._items(thread_id, context).load(item_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: dict) -> None:
        with suppress(NotFoundError):
            self._items(thread_id, context).remove(item_id)

    async def save_attachment(self, attachment: Attachment, context: dict) -> None:
        self._rows("Attachment", context).put(attachment)

    async def load_attachment(self, attachment_id: str, context: dict) -> Attachment:
        return self._rows("Attachment", context).load(attachment_id)

    async def delete_attachment(self, attachment_id: str, context: dict) -> None:
        self._rows("Attachment", context).remove(attachment_id)


# ---- Model -----------------------------------------------------------------------------------------------------------

# What MODEL=auto stands for. The template's gemini-2.0-flash and claude-3-sonnet-20240229 are shut down.
DEFAULT_MODELS = {"gemini": "gemini-flash-latest", "openai": "gpt-4o", "anthropic": "claude-sonnet-4-6"}
DEFAULT_MODELS["mock"] = DEFAULT_MODELS["openai"]


def litellm_name(provider: str, model: str) -> str:
    """LiteLLM's name of the model, provider/model. Stops the start with one line if there is none."""
    if provider not in (DEFAULT_MODELS if model == "auto" else [*DEFAULT_MODELS, *litellm.provider_list]):
        known = ", ".join(DEFAULT_MODELS)
        raise SystemExit(f"PROVIDER={provider!r} is none of {known}. Another one of LiteLLM's needs MODEL, too.")
    prefix = "openai" if provider == "mock" else provider
    return f"{prefix}/{(DEFAULT_MODELS[provider] if model == 'auto' else model).removeprefix(prefix + '/')}"


for name in [name for name in os.environ if name.endswith("_API_KEY") and not os.environ[name].strip()]:
    del os.environ[name]  # LiteLLM takes a blank key for a key
litellm.suppress_debug_info = True  # no "Give Feedback / Get Help" in the log
# A stream's finaliser sets context variables. Before Python 3.12 garbage may be collected in the midst of
# ContextVar.set, which goes on with what was freed: a segmentation fault.
litellm.CustomStreamWrapper.__del__ = lambda stream: None
MODEL_NAME = litellm_name(PROVIDER, MODEL)
needed = [] if PROVIDER == "mock" else litellm.validate_environment(MODEL_NAME)["missing_keys"]
MISSING_KEY = next((name for name in reversed(needed) if name.endswith("_API_KEY")), None)

# The newest openai-agents get LiteLLM 1.83, as later ones want an older openai: two faults that 1.106 no longer has.
if tuple(map(int, version("litellm").split(".")[:2])) < (1, 106):
    from litellm.llms.vertex_ai.gemini.vertex_and_google_ai_studio_gemini import ModelResponseIterator

    # Over aiohttp a broken connection counts as the end of the reply, and an abandoned one stays open; httpx is slower.
    litellm.disable_aiohttp_transport = True

    # At the end of a web page in a Gemini stream's place it waits for the rest for ever, and nobody else gets a turn.
    def accumulated(self, chunk: str, accumulate=ModelResponseIterator.handle_accumulated_json_chunk):
        if not chunk:
            raise StopAsyncIteration
        return accumulate(self, chunk)

    ModelResponseIterator.handle_accumulated_json_chunk = accumulated


class EmptyReply(Exception):
    """A turn ended without a text, a tool call or anything else to see."""


GUARDRAILS = InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered
TURN_FAULTS = ModelBehaviorError, ModelRefusalError, EmptyReply, *GUARDRAILS  # of a turn, not of one request
FAULTS = [  # HTTP statuses and classes of errors; what the person in the chat reads; whether to try again may help
    ({401, 403}, f"The AI provider refused the key. Check {PROVIDER.upper()}_API_KEY.", False),
    ({404}, f"The AI provider does not know the model {MODEL_NAME}. Check MODEL.", False),
    ({429}, "The AI provider limits the rate of requests. Wait a moment and try again.", True),
    ({413, litellm.ContextWindowExceededError}, "This conversation is too long. Start a new thread.", False),
    ({litellm.ContentPolicyViolationError, ModelRefusalError}, "The AI provider's content filter stopped this.", False),
    ({*GUARDRAILS}, "This server's rules do not allow this. Put it differently.", False),
    ({408, TimeoutError}, "The AI provider was silent for too long: it timed out. Try again.", True),
    ({ConnectionResetError}, "The reply was cut off: the connection to the AI provider broke. Try again.", True),
    ({ModelBehaviorError}, "The AI provider's answer was not understood. Try again.", True),
    ({EmptyReply}, "The AI provider's reply was empty. Try again.", True),
    ({*range(500, 600)}, "The AI provider is unavailable. Try again later.", True),
    ({*range(400, 500)}, "The AI provider refused this request. Start a new thread.", False),
]


class ProviderFault(CustomStreamError):
    """A fault in words for the person in the chat."""

    # Otherwise openai-agents raises an error ahead of the deltas that came before it.
    _agents_drain_queued_stream_events = True


@contextmanager
def faults_explained(*errors: type[Exception]) -> Iterator[None]:
    """Of these errors, those in FAULTS come out as ProviderFault, with their cause in the log. All others pass."""
    try:
        yield
    except errors as error:
        cause, signs = error, set()
        while cause:  # LiteLLM wraps errors, and the status that tells is not always the outermost
            signs |= {getattr(cause, "status_code", None), *type(cause).__mro__}
            cause = cause.__cause__ or cause.__context__
        for fault, message, allow_retry in FAULTS:
            if fault & signs:
                logger.error("%s (%s: %s)", message, type(error).__name__, redacted(str(error)))
                raise ProviderFault(message, allow_retry=allow_retry) from error
        raise


def redacted(text: str) -> str:
    """The text on one line, without any API key of the environment."""
    for name in os.environ:
        if name.endswith("_API_KEY"):
            text = text.replace(os.environ[name], "***")
    return " ".join(text.split())[:500]


class ProviderModel(LitellmModel):
    """LitellmModel with faults explained, and with streams that are timed, fair, and whole or a fault."""

    async def _fetch_response(self, *args, **kwargs):
        with faults_explained(Exception), anyio.fail_after(MODEL_TIMEOUT):
            fetched = await super()._fetch_response(*args, **kwargs)
        return (fetched[0], self._chunks(fetched[1])) if kwargs.get("stream") else fetched

    async def _chunks(self, stream: litellm.CustomStreamWrapper) -> AsyncIterator[litellm.ModelResponseStream]:
        with faults_explained(Exception):
            try:
                while True:
                    with anyio.fail_after(MODEL_TIMEOUT):
                        chunk = await anext(stream, None)
                    if chunk is None:
                        break
                    # LiteLLM hands over buffered chunks without a pause: with a fast provider no other chat gets a
                    # turn, and nothing of this one is sent, before the reply's end.
                    await asyncio.sleep(0)
                    yield chunk
            except litellm.exceptions.MidStreamFallbackError as error:
                if error.is_pre_first_chunk:
                    raise
                raise ConnectionResetError(str(error)) from error
            finally:
                await asyncio.shield(close(stream))  # openai-agents may cancel a run twice
            finish_reason = stream.received_finish_reason or stream.intermittent_finish_reason
            if finish_reason == "content_filter":
                raise litellm.ContentPolicyViolationError(finish_reason, self.model, PROVIDER)
            if finish_reason is None:  # LiteLLM takes the end of any body for the end of a reply
                ended = "the stream ended before the reply did"
                raise ConnectionResetError(ended) if stream.response_uptil_now else ModelBehaviorError(ended)


async def close(stream: litellm.CustomStreamWrapper) -> None:
    """Close the provider's connection. LiteLLM closes none of Anthropic's: the lines hold it."""
    lines = getattr(stream.completion_stream, "streaming_response", None)
    await stream.aclose()
    if hasattr(lines, "aclose"):
        await lines.aclose()


# LiteLLM gives a canned reply no finish reason.
model = (LitellmModel if PROVIDER == "mock" else ProviderModel)(model=MODEL_NAME)

# ---- Server ----------------------------------------------------------------------------------------------------------

REQUEST = TypeAdapter(ChatKitReq)
Events = AsyncIterator[ThreadStreamEvent]
OPERATIONS = {  # operation: the method that a user of this file has to write for it, the type of the item it is about
    "threads.custom_action": ("action", "widget"),
    "threads.sync_custom_action": ("sync_action", "widget"),
    "input.transcribe": ("transcribe", None),
    "threads.retry_after_item": (None, "user_message"),
    "threads.add_structured_input": (None, "structured_input"),
}


class Converter(ThreadItemConverter):
    """chatkit's converter of thread items to the model's input, with two gaps closed."""

    async def assistant_message_to_input(self, item: AssistantMessageItem):
        # chatkit makes `output_text` parts, which openai-agents refuses on its way to LiteLLM ("Unknown content"): the
        # second message of every conversation would fail.
        text = "".join(part.text for part in item.content)
        return {"type": "message", "role": "assistant", "content": text} if text else None

    async def tag_to_message_content(self, tag: UserMessageTagContent):
        return {"type": "input_text", "text": f"{tag.text}: {json.dumps({'id': tag.id, **tag.data})}"}


class RunEvents:
    """A run's events for stream_agent_response, each awaited by a task whose outcome is looked at.

    chatkit's _merge_generators forgets the one that waits when the client leaves, and asyncio complains of what becomes
    of it ("Task exception was never retrieved").
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
        self.converter = Converter()
        options = {"mock_response": MOCK_REPLY} if PROVIDER == "mock" else {"max_retries": 0}
        settings = ModelSettings(extra_args=options)
        self.agent = Agent[AgentContext]("Assistant", instructions=INSTRUCTIONS, model=model, model_settings=settings)

    async def process(self, request: bytes, context: dict) -> StreamingResult | NonStreamingResult:
        """Answer a request. Raises HTTPException (400) or NotFoundError before anything is stored."""
        try:
            parsed = REQUEST.validate_json(request)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise HTTPException(400, f"{place}: {problem['msg']}".lstrip(": ")[:300]) from None
        await self.check(parsed, context)
        # Not super().process(), which makes the TypeAdapter anew, some 20 ms, for every request.
        if is_streaming_req(parsed):
            return StreamingResult(self._process_streaming(parsed, context))
        return NonStreamingResult(await self._process_non_streaming(parsed, context))

    async def check(self, request: ChatKitReq, context: dict) -> None:
        """Refuse what chatkit would answer with a 500, with a broken stream, or with nothing at all."""

        def require(condition: object, reason: str) -> None:
            if not condition:
                raise HTTPException(400, reason)

        kind, params = request.type, dict(request.params)
        method, item_type = OPERATIONS.get(kind, (None, None))
        require(method in {None, *vars(type(self))}, f"{kind} is not supported by this server.")
        require(self.attachment_store or not kind.startswith("attachments."), "Attachments are not configured.")
        require((params.get("limit") or 1) > 0, "limit must be at least 1.")
        thread_id, item_id = params.get("thread_id"), params.get("item_id")
        if thread_id is not None:
            await self.store.load_thread(thread_id, context)
        for id in params.get("item_ids", [] if item_id is None else [item_id]):
            item = await self.store.load_item(thread_id, id, context)
            require(item_type in {None, item.type}, f"Item {id} is not a {item_type}.")
            require(item_type != "structured_input" or item.status == "pending", f"Item {id} is not pending.")
        if kind == "threads.add_client_tool_output":
            newest = await self.store.load_thread_items(thread_id, None, 1, "desc", context)
            pending = [item for item in newest.data if item.type == "client_tool_call" and item.status == "pending"]
            require(pending, "No client tool call is pending in this thread.")
        if isinstance(message := params.get("input"), UserMessageInput):
            require(message_text(message) or message.attachments, "The message is empty.")
            for attachment_id in message.attachments:
                await self.store.load_attachment(attachment_id, context)

    async def respond(self, thread: ThreadMetadata, input: UserMessageItem | None, context: dict) -> Events:
        """Stream the agent's reply to the thread, which `input` is already stored in.

        What was shown of a reply that fails is stored. Raises CustomStreamError with a message for the chat.
        """
        if thread.title is None and input:
            thread.title = message_text(input)[:TITLE_CHARACTERS] or None  # chatkit saves and sends it
        if MISSING_KEY:
            raise CustomStreamError(f"This server has no {MISSING_KEY}. Set it, or try PROVIDER=mock.")
        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        result = Runner.run_streamed(self.agent, await self.history(thread, context), context=agent_context)
        events = stream_agent_response(agent_context, RunEvents(result))
        answered, unfinished, texts = False, {}, defaultdict(str)
        with faults_explained(*TURN_FAULTS):
            try:
                async for event in self.with_unique_ids(events, thread, context):
                    match event:
                        case ThreadItemAddedEvent(item=item):
                            unfinished[item.id] = item
                        case ThreadItemUpdatedEvent(item_id=id, update=update):
                            texts[id] += getattr(update, "delta", "")
                        case ThreadItemDoneEvent(item=item):
                            unfinished.pop(item.id, None)
                            answered = answered or item.type != "workflow"
                        case ThreadItemRemovedEvent(item_id=id):
                            unfinished.pop(id, None)
                    yield event
                if not answered:
                    raise EmptyReply
            except Exception:
                for id, item in unfinished.items():
                    if isinstance(item, AssistantMessageItem):
                        item.content = [AssistantMessageContent(text=texts[id])]
                    yield ThreadItemDoneEvent(item=item)
                raise
            finally:
                result.cancel()  # or the provider goes on, and is paid, to the end of the reply
                # chatkit's _merge_generators leaves a queue getter behind ("Task was destroyed"): one more event, which
                # nobody sees, ends it.
                await agent_context.stream(ProgressUpdateEvent(text=""))

    async def with_unique_ids(self, events: Events, thread: ThreadMetadata, context: dict) -> Events:
        """The events of one turn, each message and client tool call under an id of its own.

        Through LiteLLM all of them carry openai-agents' placeholder `__fake_id__`, and the next would overwrite the
        last. Items whose id is the store's (workflows, widgets) keep it.
        """
        id_mapping: defaultdict[str, list[str]] = defaultdict(list)  # the model's id -> ours, the newest last
        async for event in events:
            match event:
                case ThreadItemAddedEvent(item=AssistantMessageItem() as item):
                    id_mapping[item.id].append(self.store.generate_item_id("message", thread, context))
                    item.id = id_mapping[item.id][-1]
                case ThreadItemUpdatedEvent(item_id=old_id) if old_id in id_mapping:
                    event.item_id = id_mapping[old_id][-1]
                case ThreadItemDoneEvent(item=AssistantMessageItem() as item) if item.id in id_mapping:
                    item.id = id_mapping[item.id][-1]
                case ThreadItemDoneEvent(item=ClientToolCallItem(id="__fake_id__") as item):
                    item.id = self.store.generate_item_id("tool_call", thread, context)
                case ThreadItemRemovedEvent(item_id="__fake_id__"):  # a guardrail tripped: the whole turn goes
                    for new_id in id_mapping["__fake_id__"]:
                        yield ThreadItemRemovedEvent(item_id=new_id)
                    continue
            yield event

    async def history(self, thread: ThreadMetadata, context: dict) -> list:
        """The model's input: the thread's newest items, oldest first, from a user message on."""
        items = (await self.store.load_thread_items(thread.id, None, HISTORY_ITEMS, "desc", context)).data[::-1]
        # Some providers refuse a conversation that the assistant begins.
        from_user = list(itertools.dropwhile(lambda item: item.type != "user_message", items))
        return await self.converter.to_agent_input(from_user or items)

    async def handle_stream_cancelled(self, thread: ThreadMetadata, pending_items: list, context: dict) -> None:
        """Store what was shown when the client stopped or left: the thoughts here, the text in chatkit."""
        # The shield is for Starlette, which goes on cancelling; nothing is found when the thread was deleted meanwhile.
        with anyio.CancelScope(shield=True), suppress(NotFoundError):
            for item in pending_items:
                if item.type == "workflow":
                    await self.store.add_thread_item(thread.id, item, context)
            await super().handle_stream_cancelled(thread, pending_items, context)


def message_text(message: UserMessageItem | UserMessageInput) -> str:
    """What the user typed, on one line."""
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
app.add_middleware(
    CORSMiddleware, allow_origins=ALLOWED_ORIGINS, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
)

store = MemoryStore()
server = ChatKitServerImpl(store)
STILL_WORKING = b"data: %s\n\n" % ProgressUpdateEvent(text="Still working…").model_dump_json().encode()
BROKEN_OFF = b"data: %s\n\n" % ErrorEvent(code=ErrorCode.STREAM_ERROR, allow_retry=True).model_dump_json().encode()


async def request_context(bearer: HTTPAuthorizationCredentials | None = Depends(HTTPBearer(auto_error=False))) -> dict:
    """Who is asking, as the Store receives it: put your own login here.

    {"user_id": ...} of a token in CHATKIT_TOKENS; {} if that is not set. Raises HTTPException (401).
    """
    for token, user in TOKENS.items():
        if bearer and secrets.compare_digest(token.encode(), bearer.credentials.encode()):
            return {"user_id": user}
    if TOKENS:
        raise HTTPException(401, "A valid bearer token is needed.", headers={"WWW-Authenticate": "Bearer"})
    return {}


async def request_body(request: Request) -> bytes:
    """The body. Raises HTTPException: 413 as soon as it is longer than MAX_BODY_BYTES, 400 if it breaks off."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes.")
    except ClientDisconnect:
        raise HTTPException(400, "The request broke off.") from None
    return bytes(body)


class EventStream(StreamingResponse):
    """chatkit's events, with a sign of life where they fail to come, and an error event where they break off.

    When the client leaves, Starlette cancels the stream wherever it is. Where it sends, chatkit would not hear of it,
    and not store what was shown: so it is cancelled only where it waits for chatkit.
    """

    async def stream_response(self, send) -> None:
        sent = time.monotonic()

        async def send_whole(message: dict) -> None:
            nonlocal sent
            sent = time.monotonic()
            with anyio.CancelScope(shield=True):
                await send(message)

        async def signs_of_life() -> None:
            while True:
                await asyncio.sleep(sent + SILENCE_SECONDS - time.monotonic())
                if time.monotonic() >= sent + SILENCE_SECONDS:
                    await send_whole({"type": "http.response.body", "body": STILL_WORKING, "more_body": True})

        alive = asyncio.create_task(signs_of_life())
        try:
            await super().stream_response(send_whole)
        except Exception:  # chatkit has logged it, but tells the client of a turn's errors only
            await send_whole({"type": "http.response.body", "body": BROKEN_OFF})
        finally:
            alive.cancel()


@app.exception_handler(NotFoundError)
async def not_found(request: Request, error: NotFoundError):
    return JSONResponse({"detail": str(error)}, status_code=404)


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


async def every(load_page: Callable[[str | None], Awaitable[Page]]) -> AsyncIterator:
    """The rows of all pages of a Store, of which load_page(after) loads one."""
    after, more = None, True
    while more:
        page = await load_page(after)
        for row in page.data:
            yield row
        after, more = page.after, page.has_more


@app.get("/debug/threads")
async def debug_threads(context: dict = Depends(request_context)):
    result, load_items = {}, server.store.load_thread_items
    async for thread in every(lambda after: server.store.load_threads(100, after, "asc", context)):
        items = []
        async for item in every(lambda after: load_items(thread.id, after, 100, "asc", context)):
            item_data = {"id": item.id, "type": type(item).__name__}
            if hasattr(item, "content") and item.content:
                item_data["content"] = [part.text for part in item.content if hasattr(part, "text")]
            items.append(item_data)
        result[thread.id] = {"items": items, "count": len(items)}
    return result


# ---- Start -----------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    import uvicorn

    # uvicorn raises the signal again after its shutdown, and the exit code would not be 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # One worker, whatever WEB_CONCURRENCY says: each would have a memory of its own.
    uvicorn.run(app, host=HOST, port=PORT, workers=1, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
