import os
import resource
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "examples"))
# What you have put beside main.py wins over the recipe of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend"))

import forked

# Hundreds of chats at once have two connections each, here and in the server.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

# Before the other imports, hence E402: both take seconds, and a second core is free.
forked.warm_up()
# LiteLLM would download its price map here, too, and try three times.
os.environ.update({"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_OFFLINE_MODE": "True"})

import agents  # noqa: E402
import pytest  # noqa: E402

from client import SUPPORT, Chat, Server, load_main, recipe_path  # noqa: E402
from provider import Provider  # noqa: E402

PROVIDERS = ["gemini", "openai", "anthropic"]


def pytest_addoption(parser):
    parser.addoption(
        "--store",
        metavar="package.module:factory",
        help="run the contract of tests/test_store.py on the Store that factory() makes, "
        "and on no other",
    )
    parser.addoption(
        "--postgres",
        action="store_true",
        help="run the servers as two workers on PostgreSQL, "
        "that of DATABASE_URL or a throw-away cluster",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "slow: hundreds of chats or requests, new processes, a browser, or another store "
        "(make test-slow)",
    )


def pytest_ignore_collect(collection_path, config):
    theirs = ("test_postgres.py", "test_outages.py")
    if collection_path.name in theirs and not config.getoption("--postgres"):
        return True  # its driver is not installed
    return None  # as the other hooks decide


def of_workarounds(item) -> bool:
    return item.path.name == "test_workarounds.py"


def pytest_collection_modifyitems(items):
    """Run the tests of the workarounds first.

    Without one, most other tests fail too, and do not name the cause.
    """
    items.sort(key=of_workarounds, reverse=True)


def pytest_runtest_teardown(item, nextitem):
    if (
        item.session.testsfailed
        and nextitem
        and of_workarounds(item)
        and not of_workarounds(nextitem)
    ):
        item.session.shouldfail = (
            "a fault of a library is not worked around: the other tests are not run"
        )


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def main(tmp_path_factory):
    """main.py as a module, for what can be tested without a process."""
    agents.set_tracing_disabled(True)  # its environment variable is read at the first import only
    return load_main(tmp_path_factory.mktemp("main"))


@pytest.fixture(scope="session")
def provider():
    with Provider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def fresh_script(request):
    """Each test starts with an empty script and an empty list of requests."""
    if "provider" in request.fixturenames:
        provider = request.getfixturevalue("provider")
        provider.script.clear()
        provider.requests.clear()
        provider.asked.clear()


@pytest.fixture(scope="session")
def database(request):
    """PostgreSQL, where the tests run on it."""
    if not request.config.getoption("--postgres"):
        yield None
        return
    from cluster import Database

    with Database() as database:
        yield database


USERS = {"alice": "token-of-alice", "bob": "token-of-bob"}
TOKENS = " , ".join(f"{user}:{token}" for user, token in USERS.items())
SERVERS = {  # name: the environment of a server that tests share, one for the whole session
    **{
        f"customised_{name}": {"PROVIDER": name, "MODEL_TIMEOUT": "1.5", "SILENCE_SECONDS": "0.3"}
        for name in PROVIDERS
    },
    **{name: {"PROVIDER": name} for name in PROVIDERS},
    # Blank variables, as docker compose leaves them. LiteLLM would read one as a number.
    "as_by_a_user": {"PROVIDER": "", "AIOHTTP_CONNECTOR_LIMIT": ""},  # .env has a provider
    **{f"durable_{name}": {"PROVIDER": name} for name in PROVIDERS},
    "users": {
        "PROVIDER": "openai",
        "CHATKIT_TOKENS": TOKENS,
        "ALLOWED_ORIGINS": "https://app.example, https://other.example",
    },
    "page": {"PROVIDER": "openai", "CHATKIT_TOKENS": TOKENS},  # its own origin may call it
    "no_key": dict.fromkeys(
        ("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "PROVIDER", "CHATKIT_TOKENS"), ""
    ),
    "additions": {
        "PROVIDER": "openai",
        "MODELS": "gpt-4o-mini, gemini/gemini-flash-latest,anthropic/claude-sonnet-4-6,mistral/m",
    },
    "workers": {"PROVIDER": "mock", "WEB_CONCURRENCY": "4"},
    "env_file": {"PROVIDER": ""},  # .env has a value
    "sqlite_1": {"PROVIDER": "openai"},
    "sqlite_2": {"PROVIDER": "openai"},
    "stopped": {"PROVIDER": "mock"},
    "stopped_idle": {"PROVIDER": "openai"},
    "stopped_busy": {"PROVIDER": "openai"},
    "stopped_streaming": {"PROVIDER": "openai"},
    "interrupted_streaming": {"PROVIDER": "openai"},
    "served_streaming": {"PROVIDER": "openai"},
    # Other providers. Of the names of Llama models, LiteLLM's guess is a tokenizer on the internet.
    "ollama": {"PROVIDER": "ollama_chat", "MODEL": "llama3.2"},
    "openrouter": {"PROVIDER": "openrouter", "MODEL": "openrouter/auto"},
    "mistral": {
        "PROVIDER": "mistral",
        "MODEL": "mistral-large-latest",
        "MISTRAL_API_KEY": "mistral-key-0123456789\n",  # as from a file
    },
    "deepseek": {"PROVIDER": "deepseek", "MODEL": "deepseek-chat"},
    "vllm": {"PROVIDER": "hosted_vllm", "MODEL": "meta-llama/Llama-3.1-8B-Instruct"},
    "groq": {"PROVIDER": "groq", "MODEL": "llama-3.3-70b-versatile"},
    "azure": {"PROVIDER": "azure", "MODEL": "gpt-4o"},
    "gpt-oss": {"PROVIDER": "openai", "MODEL": "openai/gpt-oss-20b"},
    "codex": {"PROVIDER": "openai", "MODEL": "gpt-5-codex"},
    "impatient": {"PROVIDER": "openai"},
}
# Of these, the ones that run on PostgreSQL, each as two workers with tables of their own.
ON_POSTGRES = (
    "customised",
    "gemini",
    "openai",
    "anthropic",
    "users",
    "stopped_idle",
    "stopped_busy",
)
# These start as a user starts them, the others as forks of a process that has done the imports.
NEW_PROCESSES = ("as_by_a_user", "served_streaming")
ENV_FILES = {"as_by_a_user": "PROVIDER=gemini\n", "env_file": "PROVIDER=mock\nPORT=1\nMODEL=\n"}
# What differs in main.py from the original.
SOON = {"SHUTDOWN_SECONDS = 5": "SHUTDOWN_SECONDS = 1"}
ON_SQLITE = {
    "store = MemoryStore()": """
from sqlite_store import SQLiteStore

store = SQLiteStore(os.environ["DATABASE"])
"""
}
CHANGES = {
    "stopped_busy": SOON,
    "stopped_streaming": {**SOON, **ON_SQLITE},
    "interrupted_streaming": {**SOON, **ON_SQLITE},
    "served_streaming": {**SOON, **ON_SQLITE},
    **{f"durable_{name}": ON_SQLITE for name in PROVIDERS},
    "impatient": {"BODY_SECONDS = 60": "BODY_SECONDS = 1", "READ_SECONDS = 60": "READ_SECONDS = 1"},
}
# What runs in main.py's place, by the first word of the server's name.
PROGRAMS = {
    "customised": SUPPORT / "customised.py",
    "durable": SUPPORT / "customised.py",
    "users": SUPPORT / "customised.py",
    "additions": SUPPORT / "additions.py",
    "sqlite": recipe_path("sqlite_store"),
    "env": SUPPORT / "served.py",
    "served": SUPPORT / "served.py",
}


@pytest.fixture(scope="session")
def servers(request, provider, database, tmp_path_factory):
    """servers(name): the server of that name, started."""
    running: dict[str, Future[Server]] = {}
    sqlite = tmp_path_factory.mktemp("sqlite") / "chat.sqlite"
    eager = [name for name in SERVERS if database and name.startswith(ON_POSTGRES)]

    def launched(name: str) -> Server:
        folder = tmp_path_factory.mktemp(name)
        if name in ENV_FILES:
            (folder / ".env").write_text(ENV_FILES[name])
        program = PROGRAMS.get(name.partition("_")[0])
        environment = {**provider.environment(), "DATABASE": str(sqlite), **SERVERS[name]}
        if name in eager:
            environment["DATABASE_URL"] = database.pooled() or database.schema()
            environment["WORKERS"] = "2"
        fork = name not in NEW_PROCESSES
        return Server(folder, environment, program, fork, CHANGES.get(name, {})).started()

    with ThreadPoolExecutor(2) as pool:

        def start(name: str) -> Server:
            if name not in running:
                running[name] = pool.submit(launched, name)
            return running[name].result()

        # Their workers take seconds to import LiteLLM: for the whole suite they start side by side.
        if len(request.session.items) > 200:
            running.update((name, pool.submit(launched, name)) for name in eager)
        yield start
    all_running = {
        name: future.result() for name, future in running.items() if not future.exception()
    }
    with ThreadPoolExecutor(len(SERVERS)) as pool:
        codes = dict(zip(all_running, pool.map(Server.stop, all_running.values()), strict=True))
    if request.session.shouldfail:  # what its server complains of is told already
        return
    # Only main.py run as a program turns the signal into an exit code of 0.
    assert not [
        name
        for name, code in codes.items()
        if code not in ((0,) if name in PROVIDERS else (0, -15))
    ], codes
    for name, server in all_running.items():
        check_log(name, server)


def check_log(name: str, server: Server) -> None:
    for text in (
        "OUTSIDE",
        "never retrieved",
        "was destroyed",
        "Unclosed",
        "Give Feedback",
        "Provider List",
    ):
        assert text not in "\n".join(server.log), f"{name}: {server.log}"


@pytest.fixture
def recipe(provider, tmp_path):
    """recipe(name, provider, **environment): a recipe, started for one test."""
    started: dict[str, Server] = {}

    def start(name: str, provider_name: str, **environment: str) -> Server:
        environment = {**provider.environment(), "PROVIDER": provider_name, **environment}
        started[name] = Server(tmp_path / name, environment, recipe_path(name), fork=True)
        return started[name].started()

    yield start
    for name, server in started.items():
        assert server.stop() == 0
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
