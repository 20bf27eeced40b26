from concurrent.futures import ThreadPoolExecutor

import pytest
from client import ROOT, Chat, Server, load_main
from provider import Provider

PROVIDERS = ["gemini", "openai", "anthropic"]


def pytest_addoption(parser):
    parser.addoption(
        "--store",
        metavar="package.module:factory",
        help="run the contract of tests/test_store.py on the Store that factory() makes, and on no other",
    )


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def main(tmp_path_factory):
    """main.py as a module, for what can be tested without a process."""
    return load_main(tmp_path_factory.mktemp("main"))


@pytest.fixture(scope="session")
def provider():
    with Provider() as provider:
        yield provider


@pytest.fixture(autouse=True)
def fresh_script(request):
    """Each test starts with a provider that has seen and promised nothing."""
    if "provider" in request.fixturenames:
        provider = request.getfixturevalue("provider")
        provider.script.clear()
        provider.requests.clear()
        provider.asked.clear()


@pytest.fixture(scope="session")
def servers(provider, tmp_path_factory):
    """start(name, program=None, **environment): a server, one for the whole session."""
    running: dict[str, Server] = {}

    def start(name: str, program=None, **environment) -> Server:
        if name not in running:
            folder = tmp_path_factory.mktemp(name)
            running[name] = Server(folder, {**provider.environment(), **environment}, program)
        return running[name].started()

    # Importing LiteLLM takes seconds: the servers that most tests need start side by side.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: start(name, PROVIDER=name), PROVIDERS))
    yield start
    codes = {name: server.stop() for name, server in running.items()}
    logs = {name: "\n".join(server.log) for name, server in running.items()}
    assert set(codes.values()) <= {0, -15}, codes  # a program of the user's own is ended by the signal
    for name, log in logs.items():
        for text in ("OUTSIDE", "never retrieved", "was destroyed", "Unclosed", "Give Feedback", "Provider List"):
            assert text not in log, f"{name}: {log}"


@pytest.fixture(params=PROVIDERS)
def provider_name(request):
    return request.param


@pytest.fixture
def server(servers, provider_name):
    """`python backend/main.py` with the provider of the test."""
    return servers(provider_name, PROVIDER=provider_name)


@pytest.fixture
def customised(servers, provider_name):
    """The server with tools, and with a second's patience for the provider."""
    return servers(
        f"customised_{provider_name}",
        ROOT / "tests" / "customised.py",
        PROVIDER=provider_name,
        MODEL_TIMEOUT="1.5",
        SILENCE_SECONDS="0.5",
    )


@pytest.fixture
def chat(server):
    return Chat(server.url)


@pytest.fixture
def custom_chat(customised):
    return Chat(customised.url)
