"""With this recipe, replies cite your documents: each [1] in a reply becomes a source in the chat.

With a key     make run APP=tests/examples/sources.py, then ask "How long can I return goods?"
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k sources
Change         Put your own documents into DOCUMENTS, or your own search into `search`.
"""

import re
from typing import Any

from agents import function_tool
from chatkit.types import Annotation, URLSource

import main

DOCUMENTS = {  # put your search here
    "1": ("Returns", "https://shop.example/returns", "Goods can be returned within 30 days."),
    "2": ("Shipping", "https://shop.example/shipping", "Shipping takes two days."),
}


@function_tool
def search(query: str) -> str:
    """Search the shop's documents. Cite each that you use by its number, like [1]."""
    words = query.lower().split()
    found = [
        f"[{number}] {title}: {text}"
        for number, (title, _, text) in DOCUMENTS.items()
        if any(word in f"{title} {text}".lower() for word in words)
    ]
    return "\n".join(found) or "Nothing found."


respond_without_sources = main.server.respond


async def respond_with_sources(*args: Any, **kwargs: Any) -> main.Events:
    async for event in respond_without_sources(*args, **kwargs):
        if event.type == "thread.item.done" and event.item.type == "assistant_message":
            for part in event.item.content:
                for match in re.finditer(r"\[(\d+)\]", part.text):
                    if match[1] in DOCUMENTS:
                        title, url, _ = DOCUMENTS[match[1]]
                        source = URLSource(title=title, url=url)
                        part.annotations.append(Annotation(source=source, index=match.end()))
        yield event


main.server.agent.tools.append(search)
main.server.respond = respond_with_sources  # type: ignore[method-assign]

if __name__ == "__main__":
    main.serve()
