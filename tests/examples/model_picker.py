"""With this recipe, users choose a model in the composer. A message may also name a tool to use.

With a key     export MODELS=openai/gpt-4o-mini,anthropic/claude-sonnet-4-6
               make run APP=tests/examples/model_picker.py
Without a key  PROVIDER=mock MODELS=openai/gpt-4o-mini make run APP=tests/examples/model_picker.py
Change         Set MODELS to names of LiteLLM, with the provider, and set the key of each provider.
               A name without a slash is a model of PROVIDER.
"""

import json
from dataclasses import replace

from agents import Agent, ModelSettings, RunConfig
from chatkit.types import InferenceOptions, ThreadMetadata, UserMessageItem
from fastapi import HTTPException

import main

names = [name.strip() for name in main.setting("MODELS", "").split(",") if name.strip()]
OFFERED = {main.model.model: main.model}
OFFERED |= {name: main.ProviderModels().get_model(name) for name in names}
# ChatKit sends the id with each message. Your own page may send `tool_choice`, too.
picker = [{"id": name, "label": name.split("/")[-1]} for name in OFFERED]
main.PAGE_OPTIONS = json.dumps({"composer": {"models": picker}})

server = main.server
agent_before, config_before = server.agent_for, server.run_config_for


def check_options(options: InferenceOptions) -> None:
    """Refuse a model or a tool that is not offered, before anything is stored."""
    if options.model and options.model not in OFFERED:
        raise HTTPException(400, f"The model {options.model:.100} is not offered.")
    tool = options.tool_choice and options.tool_choice.id
    if tool and tool not in [tool.name for tool in server.agent.tools]:
        raise HTTPException(400, f"The tool {tool:.100} is not offered.")


async def agent_for(
    thread: ThreadMetadata, input: UserMessageItem | None, context: main.Context
) -> Agent[main.ChatContext]:
    """Return the agent with the tool that the user chose, if it has this tool."""
    agent = await agent_before(thread, input, context)
    choice = input and input.inference_options.tool_choice
    if choice and choice.id in [tool.name for tool in agent.tools]:
        # openai-agents forces it in the agent's first step only. As one of the run's settings it
        # would hold for the next agent of a hand-off, too.
        forced = ModelSettings(tool_choice=choice.id)
        agent = agent.clone(model_settings=agent.model_settings.resolve(forced))
    return agent


async def run_config_for(
    thread: ThreadMetadata, input: UserMessageItem | None, context: main.Context
) -> RunConfig:
    """Return the run's settings with the model that the user chose."""
    config = await config_before(thread, input, context)
    if input is None:  # the turn goes on after a client tool: the message before it has the choice
        items = await server.newest_items(thread.id, context)
        input = next((item for item in items if item.type == "user_message"), None)
    if input and (name := input.inference_options.model):
        config = replace(config, model=OFFERED.get(name, main.model))
    return config


server.check_options = check_options  # type: ignore[method-assign]
server.agent_for = agent_for  # type: ignore[method-assign]
server.run_config_for = run_config_for  # type: ignore[method-assign]

if __name__ == "__main__":
    main.serve()
