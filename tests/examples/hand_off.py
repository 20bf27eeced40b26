"""This recipe adds a second agent. The first agent hands the chat over to it; it may hand it back.

With a key     make run APP=tests/examples/hand_off.py, then write "My invoice is wrong."
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k hand_off
Change         Replace `billing`. List every agent in AGENTS, also one in `handoff(agent, ...)`.
"""

from typing import Any

from agents import Agent, AgentHooks, Handoff, RunContextWrapper
from chatkit.types import ThreadMetadata, UserMessageItem

import main

first = main.server.agent
billing = Agent[main.ChatContext](
    name="Billing",
    handoff_description="Answers questions about invoices.",
    instructions="You answer questions about invoices. Ask for the invoice's number first.",
)
first.handoffs.append(billing)
billing.handoffs.append(first)  # and back, for everything else
AGENTS = [first, billing]


class LastAgent(AgentHooks[main.ChatContext]):
    """Keeps in the thread which agent has taken over, for the messages to come."""

    async def on_handoff(
        self, context: RunContextWrapper[main.ChatContext], agent: Agent[Any], source: Agent[Any]
    ) -> None:
        thread = context.context.thread
        # chatkit saves the thread, also after a stop or an error.
        thread.metadata = {**thread.metadata, "agent": agent.name}


async def last_agent(
    thread: ThreadMetadata, input: UserMessageItem | None, context: main.Context
) -> Agent[main.ChatContext]:
    """Return the agent that answered last, or the first one."""
    return next((agent for agent in AGENTS if agent.name == thread.metadata.get("agent")), first)


for agent in AGENTS:
    agent.hooks = LastAgent()
    tools = [
        other.tool_name if isinstance(other, Handoff) else Handoff.default_tool_name(other)
        for other in agent.handoffs
    ]
    for tool in {tool for tool in tools if tools.count(tool) > 1}:
        main.logger.warning("Two agents have one tool name, so no message is answered: %s", tool)

main.server.agent_for = last_agent  # type: ignore[method-assign]

if __name__ == "__main__":
    main.serve()
