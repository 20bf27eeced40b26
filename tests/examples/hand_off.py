"""A second agent, to which the first hands over what it knows better.

Copy this file beside main.py and run it in its place.
"""

from agents import Agent
from chatkit.agents import AgentContext

import main

billing = Agent[AgentContext[main.Context]](
    name="Billing",
    handoff_description="Answers questions about invoices.",
    instructions="You answer questions about invoices. Ask for the invoice's number first.",
)
main.server.agent.handoffs.append(billing)
billing.handoffs.append(main.server.agent)  # and back, for everything else

if __name__ == "__main__":
    main.serve()
