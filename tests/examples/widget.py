"""This recipe adds a tool that shows its progress and a widget. Its button books a table.

With a key     make run APP=tests/examples/widget.py, then write "A table for four, please."
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k widget
Change         Write your own CARD, Booking, `find_table` and `book`.
"""

from datetime import datetime
from typing import Any

from agents import RunContextWrapper, function_tool
from chatkit import types
from chatkit.actions import Action
from chatkit.widgets import WidgetTemplate
from pydantic import BaseModel, Field

import main

# WidgetTemplate.from_file reads what OpenAI's editor at https://widgets.chatkit.studio saves.
CARD = WidgetTemplate(
    {
        "version": "1.0",
        "name": "table",
        "template": """{"type": "Card", "children": [
            {"type": "Text", "value": "A table for {{ guests }}"},
            {% if booked %}
            {"type": "Caption", "value": "Booked"}
            {% else %}
            {"type": "Button", "label": "Book",
             "onClickAction": {"type": "book", "payload": {"guests": {{ guests }}}}}
            {% endif %}
        ]}""",
    }
)


class Booking(BaseModel):
    """What the template needs, and what the button sends."""

    guests: int = Field(gt=0, le=12)
    booked: bool = False


@function_tool
async def find_table(ctx: RunContextWrapper[main.ChatContext], guests: int) -> str:
    """Find a free table in the restaurant."""
    await ctx.context.stream(types.ProgressUpdateEvent(text="Looking for a table…"))
    await ctx.context.stream_widget(CARD.build(Booking(guests=guests)))
    return "The user sees the table and a button that books it."


async def book(
    thread: types.ThreadMetadata,
    action: Action[str, Any],
    sender: types.WidgetItem | None,
    context: main.Context,
) -> main.Events:
    """Book the table when the button of the widget `sender` is clicked."""
    if action.type != "book" or sender is None:
        return
    booking = Booking.model_validate(action.payload)  # it comes from a browser: check it
    booking.booked = True
    sender.widget = CARD.build(booking)
    yield types.ThreadItemReplacedEvent(item=sender)
    # The model is told by an item that the user does not see.
    note = types.HiddenContextItem(
        id=main.server.store.generate_item_id("message", thread, context),
        thread_id=thread.id,
        created_at=datetime.now(),
        content=f"The user booked the table for {booking.guests}.",
    )
    yield types.ThreadItemDoneEvent(item=note)


main.server.agent.tools.append(find_table)
main.server.action = book  # type: ignore[method-assign]

if __name__ == "__main__":
    main.serve()
