"""A second Store, on SQLite: proof that the contract can be kept by a database.

Run as a program it is the chat server with this store in MemoryStore's place.
"""

import asyncio
import os
import sqlite3

from chatkit.store import NotFoundError, Store
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
ADAPTERS = {
    "Thread": TypeAdapter(ThreadMetadata),
    "Item": TypeAdapter(ThreadItem),
    "Attachment": TypeAdapter(Attachment),
}


class SQLiteStore(Store[dict]):
    """Threads, items and attachments as rows of one table; an item's parent is its thread."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript(TABLES)

    # ---- rows

    def number(self, kind: str, id: str, context: dict, parent: str = "") -> tuple[int, str]:
        found = self.database.execute(
            "SELECT number, json FROM rows WHERE kind = ? AND parent = ? AND id = ? AND owner = ?",
            (kind, parent, id, context.get("user_id", "")),
        ).fetchone()
        if found is None:
            raise NotFoundError(f"{kind} {id} not found")
        return found

    def load(self, kind: str, id: str, context: dict, parent: str = ""):
        return ADAPTERS[kind].validate_json(self.number(kind, id, context, parent)[1])

    def save(self, kind: str, value, context: dict, parent: str = "") -> None:
        owner = context.get("user_id", "")
        changed = self.database.execute(
            "INSERT INTO rows (kind, owner, parent, id, json) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, parent, id) DO UPDATE SET json = excluded.json WHERE owner = excluded.owner",
            (
                kind,
                owner,
                parent,
                value.id,
                value.model_dump_json(exclude={"items"} if kind == "Thread" else None),
            ),
        ).rowcount
        if not changed:
            raise NotFoundError(f"{kind} {value.id} not found")

    def delete(self, kind: str, id: str, context: dict, parent: str = "") -> int:
        return self.database.execute(
            "DELETE FROM rows WHERE kind = ? AND parent = ? AND id = ? AND owner = ?",
            (kind, parent, id, context.get("user_id", "")),
        ).rowcount

    def page(
        self, kind: str, after: str | None, limit: int, order: str, context: dict, parent: str = ""
    ) -> Page:
        beyond, limit = "", min(limit, 2**31)
        if after:
            beyond = f"AND number {'>' if order == 'asc' else '<'} {self.number(kind, after, context, parent)[0]}"
        found = self.database.execute(
            f"SELECT json FROM rows WHERE kind = ? AND parent = ? AND owner = ? {beyond} "
            f"ORDER BY number {'ASC' if order == 'asc' else 'DESC'} LIMIT ?",
            (kind, parent, context.get("user_id", ""), limit + 1),
        ).fetchall()
        data = [ADAPTERS[kind].validate_json(row) for (row,) in found[:limit]]
        more = len(found) > limit
        return Page(data=data, has_more=more, after=data[-1].id if more else None)

    # ---- chatkit's Store

    async def load_thread(self, thread_id, context):
        return self.load("Thread", thread_id, context)

    async def save_thread(self, thread, context):
        self.save("Thread", thread, context)

    async def load_threads(self, limit, after, order, context):
        return self.page("Thread", after, limit, order, context)

    async def delete_thread(self, thread_id, context):
        if self.delete("Thread", thread_id, context):
            self.database.execute("DELETE FROM rows WHERE parent = ?", (thread_id,))

    async def load_thread_items(self, thread_id, after, limit, order, context):
        try:
            self.number("Thread", thread_id, context)
        except NotFoundError:
            return Page()
        return self.page("Item", after, limit, order, context, thread_id)

    async def add_thread_item(self, thread_id, item, context):
        await asyncio.sleep(
            0
        )  # the driver of a database on a network waits here, and may be cancelled
        self.number("Thread", thread_id, context)
        self.save("Item", item, context, thread_id)

    async def save_item(self, thread_id, item, context):
        await self.add_thread_item(thread_id, item, context)

    async def load_item(self, thread_id, item_id, context):
        self.number("Thread", thread_id, context)
        return self.load("Item", item_id, context, thread_id)

    async def delete_thread_item(self, thread_id, item_id, context):
        self.delete("Item", item_id, context, thread_id)

    async def save_attachment(self, attachment, context):
        self.save("Attachment", attachment, context)

    async def load_attachment(self, attachment_id, context):
        return self.load("Attachment", attachment_id, context)

    async def delete_attachment(self, attachment_id, context):
        self.delete("Attachment", attachment_id, context)


if __name__ == "__main__":
    import uvicorn

    import main

    main.server.store = SQLiteStore(os.environ["DATABASE"])
    uvicorn.run(main.app, host=main.HOST, port=main.PORT)
