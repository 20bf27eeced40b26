"""A second Store, on SQLite: proof that the contract can be kept by a database.

Try it         make run APP=tests/examples/sqlite_store.py; after a new start, the chats are there
Without a key  the same with PROVIDER=mock
Change         DATABASE is the file, chat.sqlite by default. A file of yours that imports this one
               writes main.server.store = SQLiteStore("chat.sqlite")
"""

import asyncio
import sqlite3
from dataclasses import dataclass
from typing import Generic, TypeVar

from chatkit.store import NotFoundError, Store, StoreItemType
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from pydantic import TypeAdapter

import main
from main import Context

TABLES = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT, owner TEXT, parent TEXT, id TEXT, json TEXT,
    UNIQUE (kind, parent, id)
);
CREATE INDEX IF NOT EXISTS lists ON rows (kind, owner, parent, number);
"""
Row = TypeVar("Row", ThreadMetadata, ThreadItem, Attachment)
PAGE_BYTES = 4 * 1024 * 1024  # a page of long rows ends here
THREAD, ATTACHMENT = TypeAdapter(ThreadMetadata), TypeAdapter[Attachment](Attachment)
ITEM = TypeAdapter[ThreadItem](ThreadItem)


@dataclass
class Rows(Generic[Row]):
    """A user's threads or attachments, or the items of a thread, their `parent`."""

    database: sqlite3.Connection
    kind: str
    type: TypeAdapter[Row]
    context: Context
    parent: str = ""

    def __post_init__(self) -> None:
        self.key = (self.kind, self.context.get("user_id", ""), self.parent)

    def find(self, id: str) -> tuple[int, str]:
        """Return the row's number and its JSON. Raises NotFoundError."""
        statement = "SELECT number, json FROM rows WHERE (kind, owner, parent, id) = (?, ?, ?, ?)"
        found: tuple[int, str] | None = self.database.execute(statement, (*self.key, id)).fetchone()
        if found is None:
            raise NotFoundError(f"{self.kind} {id} not found")
        return found

    def load(self, id: str) -> Row:
        return self.type.validate_json(self.find(id)[1])

    def save(self, row: Row) -> None:
        changed = self.database.execute(
            "INSERT INTO rows (kind, owner, parent, id, json) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, parent, id) DO UPDATE SET json = excluded.json "
            "WHERE owner = excluded.owner",
            (*self.key, row.id, self.type.dump_json(row).decode()),
        ).rowcount
        if not changed:  # it is another user's
            raise NotFoundError(f"{self.kind} {row.id} not found")

    def delete(self, id: str) -> int:
        statement = "DELETE FROM rows WHERE (kind, owner, parent, id) = (?, ?, ?, ?)"
        return self.database.execute(statement, (*self.key, id)).rowcount

    def page(self, after: str | None, limit: int, order: str) -> Page[Row]:
        comparison, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
        beyond = f"AND number {comparison} {self.find(after)[0]}" if after else ""
        found = self.database.execute(
            f"SELECT json FROM rows WHERE (kind, owner, parent) = (?, ?, ?) {beyond} "
            f"ORDER BY number {direction} LIMIT ?",
            (*self.key, min(limit, 2**31) + 1),
        )
        data: list[Row] = []
        size = 0
        for (json,) in found:
            if len(data) == limit or size >= PAGE_BYTES:
                return Page(data=data, has_more=True, after=data[-1].id)
            data.append(self.type.validate_json(json))
            size += len(json)
        return Page(data=data)


class SQLiteStore(Store[Context]):
    """Threads, items and attachments as rows of one table."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript(TABLES)

    def threads(self, context: Context) -> Rows[ThreadMetadata]:
        return Rows(self.database, "Thread", THREAD, context)

    def items(self, thread_id: str, context: Context) -> Rows[ThreadItem]:
        self.threads(context).find(thread_id)
        return Rows(self.database, "Item", ITEM, context, thread_id)

    def attachments(self, context: Context) -> Rows[Attachment]:
        return Rows(self.database, "Attachment", ATTACHMENT, context)

    # ---- chatkit's Store

    def generate_thread_id(self, context: Context) -> str:
        return main.long_id("thread")

    def generate_item_id(
        self, item_type: StoreItemType, thread: ThreadMetadata, context: Context
    ) -> str:
        return main.long_id(item_type)

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        return self.threads(context).load(thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        self.threads(context).save(thread)

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: Context
    ) -> Page[ThreadMetadata]:
        return self.threads(context).page(after, limit, order)

    async def delete_thread(self, thread_id: str, context: Context) -> None:
        if self.threads(context).delete(thread_id):
            statement = "DELETE FROM rows WHERE kind = 'Item' AND parent = ?"
            self.database.execute(statement, (thread_id,))

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        try:
            items = self.items(thread_id, context)
        except NotFoundError:
            return Page()
        return items.page(after, limit, order)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        # The driver of a database on a network waits here, and may be cancelled.
        await asyncio.sleep(0)
        self.items(thread_id, context).save(item)

    save_item = add_thread_item

    async def load_item(self, thread_id: str, item_id: str, context: Context) -> ThreadItem:
        return self.items(thread_id, context).load(item_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: Context) -> None:
        Rows(self.database, "Item", ITEM, context, thread_id).delete(item_id)

    async def save_attachment(self, attachment: Attachment, context: Context) -> None:
        self.attachments(context).save(attachment)

    async def load_attachment(self, attachment_id: str, context: Context) -> Attachment:
        return self.attachments(context).load(attachment_id)

    async def delete_attachment(self, attachment_id: str, context: Context) -> None:
        self.attachments(context).delete(attachment_id)


if __name__ == "__main__":
    main.server.store = SQLiteStore(main.setting("DATABASE", "chat.sqlite"))
    main.serve()
