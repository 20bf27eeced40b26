"""With this recipe, the model writes each thread's title. The reply does not wait for the title.

With a key     make run APP=tests/examples/titles.py, then send a message
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k title
Change         Give `writer` other instructions, or a cheaper model: model="openai/gpt-4o-mini".
"""

import asyncio

from agents import Agent, Runner
from chatkit.types import ThreadMetadata, UserMessageItem

import main

writer = Agent[None](
    name="Title",
    instructions="Write a title of at most five words for a chat that starts as follows.",
)
running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to a task
respond_without_titles = main.server.respond


async def respond(
    thread: ThreadMetadata, input: UserMessageItem | None, context: main.Context
) -> main.Events:
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
    words, config = thread.title, main.server.run_config  # which gives the agent its model
    try:
        result = await Runner.run(writer, f"The chat starts with: {words}", run_config=config)
        # In the turn, chatkit sees the change, saves it, and tells the client.
        over = turn_is_over.is_set()
        changed = await main.server.store.load_thread(thread.id, context) if over else thread
        if changed.title == words:  # the user may have changed it
            changed.title = str(result.final_output).strip()[: main.TITLE_LENGTH]
            if over:
                await main.server.store.save_thread(changed, context)
    except Exception as error:  # then the first words remain
        cause = main.described(error.__cause__ or error)
        main.logger.warning("No title for %s: %s", thread.id, cause)


main.server.respond = respond  # type: ignore[method-assign]

if __name__ == "__main__":
    main.serve()
