"""This recipe adds a tool that runs in the browser. With it, the model asks for the local time.

With a key     make run APP=tests/examples/client_tool.py, then ask "What time is it?"
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k client_tool
Change         Replace the tool and PAGE_OPTIONS. Your own page answers in ChatKit's `onClientTool`.
"""

from agents import RunContextWrapper, StopAtTools, function_tool
from chatkit.agents import ClientToolCall

import main


@function_tool
async def local_time(ctx: RunContextWrapper[main.ChatContext]) -> None:
    """Ask the user's browser for the time and the time zone."""
    ctx.context.client_tool_call = ClientToolCall(name="local_time", arguments={})


agent = main.server.agent
agent.tools.append(local_time)
# The turn ends here. The browser sends the tool's output, and the model goes on with it.
agent.tool_use_behavior = StopAtTools(stop_at_tool_names=["local_time"])

main.PAGE_OPTIONS = """{
  onClientTool: async ({ name }) => {
    if (name === "local_time") return { time: new Date().toString() };
  },
}"""

if __name__ == "__main__":
    main.serve()
