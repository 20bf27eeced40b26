"""This recipe stores the chats in SQLite, in one file, for one server process.

With a key     make run APP=tests/examples/sqlite_store.py (a restart keeps the chats)
Without a key  PROVIDER=mock make run APP=tests/examples/sqlite_store.py
Change         DATABASE names the file; the default is chat.sqlite. If a file of yours imports this
               one, it must set main.server.store = SQLiteStore("chat.sqlite").
"""

import sqlite3
from contextlib import suppress
from typing import Any

from chatkit.store import NotFoundError
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from pydantic import TypeAdapter

import main

TABLES = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT, owner TEXT, parent TEXT, id TEXT, json TEXT,
    UNIQUE (kind, parent, id)
);
CREATE INDEX IF NOT EXISTS lists ON rows (kind, owner, parent, number);
-- Files of an older version have the user here, too.
UPDATE rows SET owner = '' WHERE kind = 'Item' AND owner > '';
"""
PAGE_BYTES = 4 * 1024 * 1024  # a page of long rows ends here


class Table(main.Table):
    """Rows of one kind: a user's, in the column `owner`, or those of a thread, in `parent`."""

    def __init__(self, database: sqlite3.Connection, kind: str, type: Any) -> None:
        self.database = database
        self.kind = kind
        self.type: TypeAdapter[Any] = TypeAdapter(type)

    def key(self, owner: str) -> tuple[str, str, str]:
        return (self.kind, "", owner) if self.kind == "Item" else (self.kind, owner, "")

    def find(self, owner: str, id: str) -> tuple[int, str]:
        """Return the row's number and its JSON. Raises NotFoundError."""
        statement = "SELECT number, json FROM rows WHERE (kind, owner, parent, id) = (?, ?, ?, ?)"
        found = self.database.execute(statement, (*self.key(owner), id)).fetchone()
        if found is None:
            raise NotFoundError(f"{self.kind} {id} not found")
        return found[0], found[1]

    def load(self, owner: str, id: str) -> Any:
        return self.type.validate_json(self.find(owner, id)[1])

    def save(self, owner: str, value: Any) -> None:
        changed = self.database.execute(
            "INSERT INTO rows (kind, owner, parent, id, json) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (kind, parent, id) DO UPDATE SET json = excluded.json "
            "WHERE owner = excluded.owner",
            (*self.key(owner), value.id, value.model_dump_json()),
        ).rowcount
        if not changed:  # it is another user's
            raise NotFoundError(f"{self.kind} {value.id} not found")

    def delete(self, owner: str, id: str) -> None:
        statement = "DELETE FROM rows WHERE (kind, owner, parent, id) = (?, ?, ?, ?)"
        self.database.execute(statement, (*self.key(owner), id))

    async def page(self, owner: str, after: str | None, limit: int, order: str) -> Page[Any]:
        comparison, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
        beyond = f"AND number {comparison} {self.find(owner, after)[0]}" if after else ""
        found = self.database.execute(
            f"SELECT json FROM rows WHERE (kind, owner, parent) = (?, ?, ?) {beyond} "
            f"ORDER BY number {direction} LIMIT ?",
            (*self.key(owner), min(limit, 2**31) + 1),
        )
        data: list[Any] = []
        size = 0
        for (json,) in found:
            if len(data) == limit or size >= PAGE_BYTES:
                return Page(data=data, has_more=True, after=data[-1].id)
            data.append(self.type.validate_json(json))
            size += len(json)
        return Page(data=data)


class SQLiteStore(main.MemoryStore):
    """main.py's Store with other tables: threads, items and attachments are rows of one."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.executescript(TABLES)
        self._threads = Table(self.database, "Thread", ThreadMetadata)
        self._items = Table(self.database, "Item", ThreadItem)
        self._attachments = Table(self.database, "Attachment", Attachment)

    async def save_thread(self, thread: ThreadMetadata, context: main.Context) -> None:
        # chatkit may pass a Thread, which has its items with it.
        thread = ThreadMetadata(**thread.model_dump())
        self._threads.save(main.user_of(context), thread)

    async def delete_thread(self, thread_id: str, context: main.Context) -> None:
        with suppress(NotFoundError):
            await self.load_thread(thread_id, context)
            self._threads.delete(main.user_of(context), thread_id)
            statement = "DELETE FROM rows WHERE (kind, parent) = ('Item', ?)"
            self.database.execute(statement, (thread_id,))


if __name__ == "__main__":
    main.server.store = SQLiteStore(main.setting("DATABASE", "chat.sqlite"))
    main.serve()
