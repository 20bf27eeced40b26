"""A second Store, on SQLite: proof that the contract can be kept by a database.

Copy this file beside main.py, and write there, in place of `store = MemoryStore()`:

    from sqlite_store import SQLiteStore

    store = SQLiteStore("chat.sqlite")

Run as a program it is the chat server with this store, on the file that DATABASE names.
"""

import asyncio
import os
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Generic, TypeVar

from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from pydantic import TypeAdapter

TABLES = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT, owner TEXT, parent TEXT, id TEXT, json TEXT,
    UNIQUE (kind, parent, id)
);
CREATE INDEX IF NOT EXISTS lists ON rows (kind, owner, parent, number);
"""
PAGE_BYTES = 4 * 1024 * 1024  # a page of long rows ends here
Context = dict[str, str]  # {} or {"user_id": ...}
Row = TypeVar("Row", ThreadMetadata, ThreadItem, Attachment)


@dataclass
class Kind(Generic[Row]):
    name: str
    type: TypeAdapter[Row]


THREAD = Kind("Thread", TypeAdapter(ThreadMetadata))
ITEM = Kind[ThreadItem]("Item", TypeAdapter(ThreadItem))
ATTACHMENT = Kind[Attachment]("Attachment", TypeAdapter(Attachment))


class SQLiteStore(Store[Context]):
    """Threads, items and attachments as rows of one table; an item's parent is its thread."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript(TABLES)

    # ---- rows

    def find(self, kind: Kind[Row], id: str, context: Context, parent: str = "") -> tuple[int, str]:
        """Return the row's number and its JSON."""
        found: tuple[int, str] | None = self.database.execute(
            "SELECT number, json FROM rows WHERE kind = ? AND parent = ? AND id = ? AND owner = ?",
            (kind.name, parent, id, context.get("user_id", "")),
        ).fetchone()
        if found is None:
            raise NotFoundError(f"{kind.name} {id} not found")
        return found

    def load(self, kind: Kind[Row], id: str, context: Context, parent: str = "") -> Row:
        _, json = self.find(kind, id, context, parent)
        return kind.type.validate_json(json)

    def save(self, kind: Kind[Row], row: Row, context: Context, parent: str = "") -> None:
        owner = context.get("user_id", "")
        json = row.model_dump_json(exclude={"items"} if kind.name == "Thread" else None)
        changed = self.database.execute(
            "INSERT INTO rows (kind, owner, parent, id, json) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, parent, id) DO UPDATE SET json = excluded.json "
            "WHERE owner = excluded.owner",
            (kind.name, owner, parent, row.id, json),
        ).rowcount
        if not changed:
            raise NotFoundError(f"{kind.name} {row.id} not found")

    def delete(self, kind: Kind[Row], id: str, context: Context, parent: str = "") -> int:
        return self.database.execute(
            "DELETE FROM rows WHERE kind = ? AND parent = ? AND id = ? AND owner = ?",
            (kind.name, parent, id, context.get("user_id", "")),
        ).rowcount

    def page(
        self,
        kind: Kind[Row],
        after: str | None,
        limit: int,
        order: str,
        context: Context,
        parent: str = "",
    ) -> Page[Row]:
        comparison, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
        beyond, limit = "", min(limit, 2**31)
        if after:
            number, _ = self.find(kind, after, context, parent)
            beyond = f"AND number {comparison} {number}"
        found = self.database.execute(
            f"SELECT json FROM rows WHERE kind = ? AND parent = ? AND owner = ? {beyond} "
            f"ORDER BY number {direction} LIMIT ?",
            (kind.name, parent, context.get("user_id", ""), limit + 1),
        )
        data: list[Row] = []
        size = 0
        more = False
        for (json,) in found:
            more = len(data) == limit or size >= PAGE_BYTES
            if more:
                break
            data.append(kind.type.validate_json(json))
            size += len(json)
        return Page(data=data, has_more=more, after=data[-1].id if more else None)

    # ---- chatkit's Store

    def generate_thread_id(self, context: Context) -> str:
        return self.unique_id("thread")

    def generate_item_id(
        self, item_type: StoreItemType, thread: ThreadMetadata, context: Context
    ) -> str:
        return self.unique_id(item_type)

    def unique_id(self, item_type: StoreItemType) -> str:
        """Return an id with 128 random bits. Two of chatkit's own are soon the same."""
        prefix = default_generate_id(item_type).split("_")[0]
        return f"{prefix}_{secrets.token_hex(16)}"

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        return self.load(THREAD, thread_id, context)

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        self.save(THREAD, thread, context)

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: Context
    ) -> Page[ThreadMetadata]:
        return self.page(THREAD, after, limit, order, context)

    async def delete_thread(self, thread_id: str, context: Context) -> None:
        if self.delete(THREAD, thread_id, context):
            self.database.execute("DELETE FROM rows WHERE parent = ?", (thread_id,))

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        try:
            self.find(THREAD, thread_id, context)
        except NotFoundError:
            return Page()
        return self.page(ITEM, after, limit, order, context, thread_id)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        # The driver of a database on a network waits here, and may be cancelled.
        await asyncio.sleep(0)
        self.find(THREAD, thread_id, context)
        self.save(ITEM, item, context, thread_id)

    async def save_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        await self.add_thread_item(thread_id, item, context)

    async def load_item(self, thread_id: str, item_id: str, context: Context) -> ThreadItem:
        self.find(THREAD, thread_id, context)
        return self.load(ITEM, item_id, context, thread_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: Context) -> None:
        self.delete(ITEM, item_id, context, thread_id)

    async def save_attachment(self, attachment: Attachment, context: Context) -> None:
        self.save(ATTACHMENT, attachment, context)

    async def load_attachment(self, attachment_id: str, context: Context) -> Attachment:
        return self.load(ATTACHMENT, attachment_id, context)

    async def delete_attachment(self, attachment_id: str, context: Context) -> None:
        self.delete(ATTACHMENT, attachment_id, context)


if __name__ == "__main__":
    import main

    if main.WORKERS > 1:  # each would import this file, without what follows
        raise SystemExit("For WORKERS, write `store = SQLiteStore(...)` into main.py.")
    main.server.store = SQLiteStore(os.getenv("DATABASE", "chat.sqlite"))
    main.serve()
