"""Titles by the model in place of the first message's words, without a turn that waits for them.

Copy this file beside main.py and run it in its place.
"""

import asyncio
from collections.abc import AsyncIterator

from agents import Agent, Runner
from chatkit.types import ThreadMetadata, ThreadStreamEvent, UserMessageItem

import main

writer = Agent[None](
    name="Title",
    instructions="Write a title of at most five words for a chat that starts as follows.",
)
running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to a task


respond_without_titles = main.server.respond


async def respond_with_titles(
    thread: ThreadMetadata, input: UserMessageItem | None, context: main.Context
) -> AsyncIterator[ThreadStreamEvent]:
    untitled = thread.title is None and input is not None
    turn_is_over = asyncio.Event()
    try:
        async for event in respond_without_titles(thread, input, context):
            if untitled and thread.title:
                untitled = False
                task = asyncio.create_task(write_title(thread, context, turn_is_over))
                running.add(task)
                task.add_done_callback(running.discard)
            yield event
    finally:
        turn_is_over.set()


async def write_title(
    thread: ThreadMetadata, context: main.Context, turn_is_over: asyncio.Event
) -> None:
    first_words = thread.title
    try:
        # The run's configuration gives the agent its model.
        result = await Runner.run(
            writer, f"The chat starts with: {first_words}", run_config=main.server.run_config
        )
        title = str(result.final_output).strip()[:60]
        if not turn_is_over.is_set():
            if thread.title == first_words:  # the user may have changed it
                thread.title = title  # chatkit sees the change, saves it, and tells the client
            return
        stored = await main.server.store.load_thread(thread.id, context)
        if stored.title == first_words:
            stored.title = title
            await main.server.store.save_thread(stored, context)
    except Exception as error:  # then the first words remain
        main.logger.warning("No title for %s: %s", thread.id, type(error).__name__)


# A subclass would do as well, but a server of its own has an agent of its own, without your tools.
main.server.respond = respond_with_titles  # type: ignore[method-assign]

if __name__ == "__main__":
    main.serve()
