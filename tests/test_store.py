"""chatkit's Store contract, as main.py keeps it, for MemoryStore and for yours:

    backend/.venv/bin/python -m pytest tests/test_store.py --store package.module:factory

`factory()` returns a new, empty Store for each test. The context is {} or {"user_id": ...}.
"""

import importlib
from datetime import datetime, timedelta
from functools import partial

import pytest
from chatkit import types
from chatkit.store import NotFoundError
from chatkit.types import AssistantMessageContent, AssistantMessageItem, Page, ThreadMetadata
from chatkit.widgets import Card, Text

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456)
ALICE, BOB = {"user_id": "alice"}, {"user_id": "bob"}
ATTACHMENT = types.FileAttachment(id="atc_1", name="a.txt", mime_type="text/plain")


def pytest_generate_tests(metafunc):
    if "store" in metafunc.fixturenames:
        theirs = metafunc.config.getoption("--store")
        ours = ["memory", "sqlite"]
        if metafunc.config.getoption("--postgres"):
            ours = ["postgres", "pgbouncer"]
        metafunc.parametrize("store", [theirs] if theirs else ours, indirect=True)


@pytest.fixture
async def store(request):
    if request.param == "memory":
        yield request.getfixturevalue("main").MemoryStore()
    elif request.param == "sqlite":
        request.getfixturevalue("main")  # which the recipe imports
        yield importlib.import_module("sqlite_store").SQLiteStore(":memory:")
    elif ":" in request.param:
        module, _, factory = request.param.partition(":")
        yield getattr(importlib.import_module(module), factory)()
    else:
        async for store in importlib.import_module("stores").opened(request):
            yield store


def thread(id: str, **more) -> ThreadMetadata:
    return ThreadMetadata(id=id, created_at=NOW, **more)


def item(id: str, text: str = "hello", created_at: datetime = NOW) -> AssistantMessageItem:
    content = [AssistantMessageContent(text=text)]
    return AssistantMessageItem(id=id, thread_id="thr_1", created_at=created_at, content=content)


async def filled(store, count: int, context: dict | None = None) -> None:
    """Make a thread thr_1 with items msg_0 … of one and the same timestamp."""
    await store.save_thread(thread("thr_1"), context or {})
    for number in range(count):
        await store.add_thread_item("thr_1", item(f"msg_{number}"), context or {})


async def items(store, order="asc", limit=1000, context: dict | None = None) -> list[str]:
    page = await store.load_thread_items("thr_1", None, limit, order, context or {})
    return [row.id for row in page.data]


async def test_saving_again_replaces_the_thread_where_it_stands(store):
    """Without items: chatkit's own save_thread calls hand over a Thread, items and all."""
    for number in range(3):
        whole = types.Thread(id=f"thr_{number}", created_at=NOW, items=Page(data=[item("msg_x")]))
        await store.save_thread(whole, {})
    saved = thread("thr_1", title="new", metadata={"a": [1, None, {"b": 1.5}]})
    await store.save_thread(saved, {})
    page = await store.load_threads(10, None, "asc", {})
    assert page.data == [thread("thr_0"), saved, thread("thr_2")]
    assert {type(loaded) for loaded in page.data} == {ThreadMetadata}
    assert await store.load_thread("thr_1", {}) == saved and await items(store) == []


async def test_every_kind_of_item_comes_back_as_it_was_added(store):
    base = {"thread_id": "thr_1", "created_at": NOW}
    source = types.Annotation(source=types.URLSource(url="http://x", title="x"), index=1)
    card = Card(children=[Text(id="t", value="v", streaming=False)])
    said = [
        types.UserMessageTextContent(text="hi"),
        types.UserMessageTagContent(type="input_tag", id="t", text="tag", data={"k": [1]}),
    ]
    options = types.InferenceOptions(model="m")
    about = {"attachments": [ATTACHMENT], "quoted_text": "q", "inference_options": options}
    call = {"call_id": "c", "name": "n", "arguments": {"a": 1}, "output": [1, {"b": None}]}
    thoughts = types.Workflow(type="reasoning", tasks=[types.ThoughtTask(content="hm")])
    kinds = [
        types.UserMessageItem(id="1", content=said, **about, **base),
        AssistantMessageItem(
            id="2", content=[AssistantMessageContent(text="see", annotations=[source])], **base
        ),
        types.ClientToolCallItem(id="3", **call, **base),
        types.WidgetItem(id="4", widget=card, copy_text="c", **base),
        types.WorkflowItem(id="5", workflow=thoughts, **base),
        types.TaskItem(id="6", task=types.CustomTask(title="t", content="c"), **base),
        types.HiddenContextItem(id="7", content={"any": ["thing", 1, None]}, **base),
        types.SDKHiddenContextItem(id="8", content="hidden", **base),
        types.EndOfTurnItem(id="9", **base),
    ]
    await store.save_thread(thread("thr_1"), {})
    for kind in kinds:
        await store.add_thread_item("thr_1", kind, {})
    assert (await store.load_thread_items("thr_1", None, 100, "asc", {})).data == kinds
    assert [await store.load_item("thr_1", kind.id, {}) for kind in kinds] == kinds


TEXTS = ["NUL \0 and \\u0000", "\ufffe0 \ufffe1 \ufffe\0", "\\\0 \"'%s%(id)s\n\r\t\x7f"]
TEXTS += ["😀 \u202eשלום\u202c e\u0301 \u2028 ünïcode"]


@pytest.mark.parametrize("text", TEXTS)
async def test_every_text_comes_back_as_it_was_added(store, text):
    saved = thread("thr_1", title=text, metadata={text: [text]})
    await store.save_thread(saved, {})
    await store.add_thread_item("thr_1", item("msg_1", text), {})
    assert await store.load_thread("thr_1", {}) == saved
    assert await store.load_item("thr_1", "msg_1", {}) == item("msg_1", text)


async def test_what_is_missing_is_not_found(store):
    await filled(store, 1)
    for call, id in (
        (store.load_thread("thr_9", {}), "Thread thr_9"),
        (store.load_item("thr_1", "msg_9", {}), "Item msg_9"),
        (store.load_item("thr_9", "msg_0", {}), ".*"),
        (store.add_thread_item("thr_9", item("msg_1"), {}), "Thread thr_9"),
        (store.save_item("thr_9", item("msg_1"), {}), "Thread thr_9"),
        (store.load_attachment("atc_9", {}), "Attachment atc_9"),
        (store.load_threads(5, "thr_9", "desc", {}), "Thread thr_9"),
        (store.load_thread_items("thr_1", "msg_9", 5, "asc", {}), "Item msg_9"),
        (store.load_thread_items("thr_1", "msg_9", 5, "desc", {}), "Item msg_9"),
    ):
        with pytest.raises(NotFoundError, match=f"^{id} not found$"):
            await call
    assert (await store.load_thread_items("thr_9", None, 5, "asc", {})).data == []
    for id in ("", "\0", "msg_0\0", "\ufffe0", "' OR 1=1 --", "%s"):
        for call in (store.load_item("thr_1", id, {}), store.load_thread(id, {})):
            with pytest.raises(NotFoundError):
                await call


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("count", [0, 5, 6, 11])
async def test_pages_show_every_row_once(store, order, count):
    """A page's `after` is its last row's id while there are more, and empty on the last page."""
    await filled(store, count)
    for number in range(count):
        await store.save_thread(thread(f"thr_1{number:03}"), {})

    ids = [f"msg_{number}" for number in range(count)]
    threads = ["thr_1"] + [f"thr_1{number:03}" for number in range(count)]
    for load, expected in (
        (lambda after: store.load_thread_items("thr_1", after, 5, order, {}), ids),
        (lambda after: store.load_threads(5, after, order, {}), threads),
    ):
        seen, page = [], Page(has_more=True)
        while page.has_more:
            page = await load(page.after)
            assert len(page.data) <= 5
            seen += [row.id for row in page.data]
            assert page.has_more == (len(seen) < len(expected))
            assert page.after == (page.data[-1].id if page.has_more else None)
        assert seen == (expected if order == "asc" else expected[::-1])


async def test_a_page_of_long_rows(request, store):
    """It may end before `limit`, as those of our databases do: a page is read at once."""
    ends_early = request.node.callspec.params["store"] in ("sqlite", "postgres", "pgbouncer")
    await store.save_thread(thread("thr_1"), {})
    for number in range(6):
        await store.add_thread_item("thr_1", item(f"msg_{number}", "a" * 2**20), {})
    for order in ("asc", "desc"):
        seen, page = [], Page(has_more=True)
        while page.has_more:
            page = await store.load_thread_items("thr_1", page.after, 100, order, {})
            assert page.data and (len(page.data) < 6 or not ends_early)
            seen += [row.id for row in page.data]
        assert seen == sorted(seen, reverse=order == "desc") and len(seen) == 6


async def test_order_is_that_of_adding_whatever_the_timestamps(store):
    """What is added or saved again stays in its place. After a deletion it is new."""
    await store.save_thread(thread("thr_1"), {})
    ids = [f"msg_{9 - number}" for number in range(10)]
    for number, id in enumerate(ids):
        created_at = NOW + timedelta(seconds=number % 3)
        await store.add_thread_item("thr_1", item(id, created_at=created_at), {})
    for write in (store.add_thread_item, store.save_item):
        changed = item("msg_5", f"changed by {write.__name__}")
        await write("thr_1", changed, {})
        assert await store.load_item("thr_1", "msg_5", {}) == changed
    assert await items(store) == ids and await items(store, "desc") == ids[::-1]
    await store.delete_thread_item("thr_1", "msg_5", {})
    for id in ("msg_5", "msg_10"):
        await store.save_item("thr_1", item(id), {})
    ids.remove("msg_5")
    assert await items(store) == [*ids, "msg_5", "msg_10"]
    page = await store.load_thread_items("thr_1", "msg_0", 5, "asc", {})
    assert page == Page(data=[item("msg_5"), item("msg_10")])
    for limit in (2**31, 2**63, 10**30):
        assert len(await items(store, limit=limit)) == 11


async def test_nothing_is_shared_with_the_caller(store):
    """Changing what went in or came out changes nothing that is stored."""

    async def loaded() -> list:
        return [
            await store.load_thread("thr_1", {}),
            *(await store.load_threads(1, None, "asc", {})).data,
            await store.load_item("thr_1", "msg_1", {}),
            *(await store.load_thread_items("thr_1", None, 1, "asc", {})).data,
            await store.load_attachment("atc_1", {}),
        ]

    given = [thread("thr_1", metadata={"a": [1]}), item("msg_1"), ATTACHMENT.model_copy()]
    await store.save_thread(given[0], {})
    await store.add_thread_item("thr_1", given[1], {})
    await store.save_attachment(given[2], {})
    before = [row.model_copy(deep=True) for row in await loaded()]
    for value in (*given, *await loaded()):
        value.id = "changed"
        if isinstance(value, ThreadMetadata):
            value.metadata["a"].append(2)
        elif isinstance(value, AssistantMessageItem):
            value.content[0].text = "changed"
    assert await loaded() == before


async def test_deleting_twice_is_as_good_as_once(store):
    await filled(store, 3)
    await store.save_thread(thread("thr_2"), {})
    await store.save_attachment(ATTACHMENT, {})
    for _ in range(2):
        await store.delete_thread_item("thr_1", "msg_1", {})
        await store.delete_thread_item("thr_9", "msg_1", {})
        await store.delete_attachment("atc_1", {})
    assert await items(store) == ["msg_0", "msg_2"]
    after_it = store.load_thread_items("thr_1", "msg_1", 5, "asc", {})
    for gone in (after_it, store.load_attachment("atc_1", {}), store.load_thread("thr_1", {})):
        with pytest.raises(NotFoundError):
            await gone
        await store.delete_thread("thr_1", {})
    assert [row.id for row in (await store.load_threads(5, None, "asc", {})).data] == ["thr_2"]
    await store.save_thread(thread("thr_1"), {})
    assert await items(store) == []


async def test_each_user_sees_their_own_rows_only(store):
    await filled(store, 2, ALICE)
    await store.save_attachment(ATTACHMENT, ALICE)
    for other in (BOB, {}):
        for call in (
            store.load_thread("thr_1", other),
            store.save_thread(thread("thr_1", title="mine now"), other),
            store.load_item("thr_1", "msg_0", other),
            store.add_thread_item("thr_1", item("msg_9"), other),
            store.save_item("thr_1", item("msg_0", "changed"), other),
            store.load_attachment("atc_1", other),
            store.load_threads(5, "thr_1", "asc", other),
        ):
            with pytest.raises(NotFoundError):
                await call
        assert (await store.load_threads(5, None, "asc", other)).data == []
        assert (await store.load_thread_items("thr_1", None, 5, "asc", other)).data == []
        await store.delete_thread_item("thr_1", "msg_0", other)
        await store.delete_thread("thr_1", other)
        await store.delete_attachment("atc_1", other)
    page = await store.load_thread_items("thr_1", None, 5, "asc", ALICE)
    assert page.data == [item("msg_0"), item("msg_1")]
    assert await store.load_thread("thr_1", ALICE) == thread("thr_1")
    assert await store.load_attachment("atc_1", ALICE) == ATTACHMENT


async def test_ids_have_chatkits_prefixes_and_do_not_repeat(store):
    """128 random bits: 32 digits of hex, or 22 of base 64. chatkit's 32 bits collide."""
    kinds = {"message": "msg_", "tool_call": "tc_", "workflow": "wf_", "thread": "thr_"}
    for kind, prefix in kinds.items():
        new_id = partial(store.generate_item_id, kind, thread("thr_1"))
        new_id = store.generate_thread_id if kind == "thread" else new_id
        ids = {new_id({}) for _ in range(100)}
        assert len(ids) == 100 and all(id.startswith(prefix) for id in ids)
        assert min(len(id.removeprefix(prefix)) for id in ids) >= 22
