import importlib
import logging
import os
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked

# Hundreds of chats at once have two connections each, here and in the server.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

# Before the other imports, hence E402: both take seconds, and a second core is free.
forked.warm_up()
# LiteLLM would download its price map here, too, and try three times; and read your .env.
os.environ.update({"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_OFFLINE_MODE": "True"})
os.environ["LITELLM_MODE"] = "PRODUCTION"

import agents  # noqa: E402
import litellm  # noqa: E402, F401  (main.py's fixture needs it)
import pytest  # noqa: E402

from client import POSTGRES, SUPPORT, Chat, Server, load_main, recipe_path  # noqa: E402
from provider import Provider  # noqa: E402

PROVIDERS = ["gemini", "openai", "anthropic"]
COMPLAINTS = ("never retrieved", "was destroyed", "Unclosed", "never awaited", "Traceback", "ERROR")
USERS = {"alice": "token-of-alice", "bob": "token-of-bob"}
CUSTOMISED = {"PROGRAM": str(SUPPORT / "customised.py")}
# LiteLLM treats each family of models in its own way. The tests of what one demands name one of it.
MODELS = {"gemini": "gemini-flash-latest", "openai": "gpt-4o", "anthropic": "claude-sonnet-4-6"}
NO_KEYS = dict.fromkeys([f"{name.upper()}_API_KEY" for name in PROVIDERS], "")
NO_KEYS |= dict.fromkeys(["GEMINI_API_BASE", "OPENAI_BASE_URL", "ANTHROPIC_API_BASE"], "")

# The environments of the servers that tests share. PROGRAM runs in main.py's place, WORKERS are
# those of uvicorn, and ENV_FILE is what the .env file holds. `customised_` servers have the tools
# of support/customised.py. A name with a slash is a provider and its model: servers("groq/llama").
SERVERS = {
    **{name: {"PROVIDER": name} for name in PROVIDERS},
    # Hosting platforms set WEB_CONCURRENCY, and uvicorn would start workers.
    "no_key": {"PROVIDER": "", "WEB_CONCURRENCY": "4"} | NO_KEYS,
    # Blank variables, as docker compose leaves them. LiteLLM would read one as a number.
    "as_by_a_user": {"PROVIDER": "", "AIOHTTP_CONNECTOR_LIMIT": "", "ENV_FILE": "PROVIDER=gemini"},
    "env_file": {"ENV_FILE": "PROVIDER=mock\nPORT=1\nMODEL=\n", "WORKERS": "1"},
    "users": CUSTOMISED
    | {
        "PROVIDER": "openai",
        "USERS": ",".join(f"{user}:{token}" for user, token in USERS.items()),
        "ALLOWED_ORIGINS": "https://app.example, https://other.example/",
    },
}
for name, model in MODELS.items():
    short = {"MODEL_TIMEOUT": "1.5", "SILENCE_SECONDS": "0.3"}
    SERVERS[f"customised_{name}"] = {"PROVIDER": name, "MODEL": model} | CUSTOMISED | short
# With --postgres, these run on PostgreSQL, each as two workers with tables of their own.
ON_POSTGRES = [*PROVIDERS, *[f"customised_{name}" for name in PROVIDERS], "users"]


def pytest_addoption(parser):
    theirs = "run tests/test_store.py on the Store that factory() makes, and on no other"
    parser.addoption("--store", metavar="package.module:factory", help=theirs)
    workers = "run two workers on PostgreSQL, that of DATABASE_URL or a throw-away cluster"
    parser.addoption("--postgres", action="store_true", help=workers)


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def main(tmp_path_factory):
    """main.py as a module, for what can be tested without a process."""
    agents.set_tracing_disabled(True)  # its environment variable is read at the first import only
    module = load_main(tmp_path_factory.mktemp("main"))
    sys.modules["main"] = module  # not one that another test has loaded before
    module.repair_libraries()  # as the start of the server does
    return module


@pytest.fixture
def log(main, monkeypatch, caplog):
    """caplog, with what main.py logs in this process: the provider's uvicorn silences its own."""
    monkeypatch.setattr(main, "logger", logging.getLogger("main"))
    caplog.set_level(logging.INFO, "main")
    return caplog


@pytest.fixture(scope="session")
def provider():
    with Provider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def fresh_script(request):
    """Each test starts with an empty script and an empty list of requests."""
    if "provider" in request.fixturenames:
        request.getfixturevalue("provider").reset()


@pytest.fixture(scope="session")
def database(request):
    """PostgreSQL, where the tests run on it."""
    if not request.config.getoption("--postgres"):
        yield None
        return
    from cluster import Database

    with Database() as database:
        yield database


@pytest.fixture(scope="session")
def postgres_store(main, database):
    """The recipe as a module of this process. Imported, it sets the server's store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABASE_URL", database.schema())
        patch.setattr(main.server, "store", main.server.store)  # until this block ends
        return importlib.import_module("postgres_store")


@pytest.fixture(scope="session")
def servers(request, provider, database, tmp_path_factory):
    """servers(name): the server of that name in SERVERS, started."""
    running: dict[str, Server] = {}

    def launched(name: str) -> Server:
        folder = tmp_path_factory.mktemp(name.replace("/", "-"))
        chosen, _, model = name.partition("/")
        key = {f"{chosen.upper()}_API_KEY": f"{chosen}-key-0123456789\n"}  # as from a file
        settings = SERVERS.get(name) or {"PROVIDER": chosen, "MODEL": model} | key
        environment = provider.environment() | settings
        if "ENV_FILE" in environment:
            (folder / ".env").write_text(environment.pop("ENV_FILE"))
        if database and name in ON_POSTGRES:
            environment["DATABASE_URL"] = database.pooled() or database.schema()
            return Server(folder, environment, POSTGRES / "served.py", fork=True, workers=2)
        program, workers = environment.pop("PROGRAM", None), int(environment.pop("WORKERS", 0))
        fork = name != "as_by_a_user"  # the others are forks of a process with all imports
        return Server(folder, environment, program and Path(program), fork, workers=workers)

    def start(name: str) -> Server:
        if name not in running:
            running[name] = launched(name).started()
        return running[name]

    yield start
    with ThreadPoolExecutor() as pool:
        codes = dict(zip(running, pool.map(Server.stop, running.values()), strict=True))
    # uvicorn ends with the signal that it got; its workers' parent ends with 0.
    assert set(codes.values()) <= {0, -15}, codes
    for name, server in running.items():
        check_log(name, server)


def check_log(name: str, server: Server) -> None:
    for text in ("OUTSIDE", "Give Feedback", *COMPLAINTS[:3]):
        assert text not in "\n".join(server.log), f"{name}: {server.log}"


@pytest.fixture
def recipe(provider, tmp_path):
    """recipe(name, provider, **environment): a recipe, or a file with `code`, for one test."""
    started: dict[str, Server] = {}

    def start(name: str, provider_name: str, code: str = "", **environment: str) -> Server:
        chosen = {"PROVIDER": provider_name, "MODEL": MODELS.get(provider_name, "auto")}
        environment = provider.environment() | chosen | environment
        program = recipe_path(name)
        if code:
            program = tmp_path / f"{name}.py"
            program.write_text(code)
        started[name] = Server(tmp_path / name, environment, program, fork=True)
        return started[name].started()

    yield start
    for name, server in started.items():
        assert server.stop() == -15
        check_log(name, server)


@pytest.fixture(params=PROVIDERS)
def provider_name(request):
    return request.param


@pytest.fixture
def server(servers, provider_name):
    """`python backend/main.py` with the provider of the test."""
    return servers(provider_name)


@pytest.fixture
def customised(servers, provider_name):
    """The server with tools, a short MODEL_TIMEOUT and frequent heartbeats."""
    return servers(f"customised_{provider_name}")


@pytest.fixture
def chat(server):
    return Chat(server.url)


@pytest.fixture
def custom_chat(customised):
    return Chat(customised.url)
