"""The page at GET /chatkit, in the system's Chromium, with a stand-in for OpenAI's script."""

import json
import re
import shutil
import time

import pytest

from client import ROOT, SUPPORT, free_port
from conftest import USERS
from test_examples import file_with

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
try:
    from playwright.sync_api import Page, Route, expect, sync_playwright
except ImportError:
    BROWSER = None
if not BROWSER:
    pytest.skip("needs Chromium and tests/requirements-browser.txt", allow_module_level=True)

pytestmark = pytest.mark.slow

SCRIPT = "https://cdn.platform.openai.com/deployments/chatkit/chatkit.js"
STAND_IN = (SUPPORT / "chatkit_stand_in.js").read_text()
DOMAIN_KEY = re.search(r'domainKey: "(.*?)"', (ROOT / "backend" / "main.py").read_text())[1]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page in a session of its own. A script on it that fails, fails the test."""
    context = browser.new_context()
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.route(SCRIPT, lambda route: route.fulfill(content_type="text/javascript", body=STAND_IN))
    yield page
    context.close()
    assert errors == []


def forward(page: Page, url: str, server) -> None:
    """Have the browser reach the server at this address, as behind a proxy."""

    def answer(route: Route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace(url, server.url)))

    page.route(f"{url}/**", answer)


def answer_prompts(page: Page, *answers: str | None) -> list[str]:
    """Type these into the prompts, one after the other; None is the button to cancel."""
    asked: list[str] = []

    def answer(dialog) -> None:
        text = answers[len(asked)]
        asked.append(dialog.message)
        dialog.dismiss() if text is None else dialog.accept(text)

    page.on("dialog", answer)
    return asked


def say(page: Page, text: str) -> None:
    page.get_by_placeholder("Message the AI").fill(text)
    page.keyboard.press("Enter")


def options(page: Page) -> dict:
    """What the page passed to setOptions; a function counts as true."""
    shown = "JSON.stringify(chat.options, (_, value) => typeof value == 'function' || value)"
    return json.loads(page.evaluate(shown))


@pytest.mark.parametrize("path", ["", "/some/where"])
def test_a_chat(page, servers, main, path):
    server = servers("env_file")
    if path:
        forward(page, f"{server.url}{path}", server)
    page.goto(f"{server.url}{path}/chatkit?theme=dark#top")
    for text in ("Hello!", "And again."):
        say(page, text)
        expect(page.locator(".user").last).to_have_text(text)
        expect(page.locator(".assistant").last).to_have_text(main.MOCK_REPLY)
    expect(page.locator("#notice")).to_have_count(0)
    url = f"{server.url}{path}/chatkit"
    assert options(page)["api"] == {"url": url, "domainKey": DOMAIN_KEY, "fetch": True}


def test_without_openais_script(page, servers):
    page.route(SCRIPT, lambda route: route.abort())
    page.goto(f"{servers('env_file').url}/chatkit")
    expect(page.locator("#notice")).to_have_text(f"ChatKit could not be loaded. It needs {SCRIPT}")


def test_the_token_is_asked_for(page, servers, provider):
    """At a host that is not this machine, which also needs a domain key of OpenAI's."""
    url, token = "https://app.example", USERS["alice"]
    forward(page, url, servers("users"))
    asked = answer_prompts(page, None, "nobody", token, token)
    page.goto(f"{url}/chatkit")
    expect(page.locator("#notice")).to_contain_text("needs a domain key for app.example")
    with page.expect_event("dialog"):
        say(page, "Hello?")
    expect(page.locator(".assistant")).to_have_count(0)
    for _ in range(2):  # the token is known until the tab is closed
        page.reload()
        say(page, "Hello!")
        expect(page.locator(".assistant")).to_have_text("You said: Hello!")
        assert len(asked) == 3
    page.evaluate("sessionStorage.token = 'Bearer old'")
    say(page, "Once more!")
    expect(page.locator(".assistant").last).to_have_text("You said: Once more!")
    assert len(asked) == 4 and "CHATKIT_TOKENS" in asked[0]

    # It is told to this server only.
    told = []

    def answer(route: Route) -> None:
        told.append(route.request.headers.get("authorization"))
        route.fulfill(headers={"Access-Control-Allow-Origin": "*"}, body="{}")

    for place in ("https://files.example/upload", f"{url}/health"):
        page.route(place, answer)
        page.evaluate(f"chat.options.api.fetch('{place}')")
    assert told == [None, f"Bearer {token}"]


def test_a_client_tool_of_the_recipe(page, recipe):
    mine = "main.PAGE_OPTIONS = '{ api: { domainKey: 7 }, ' + main.PAGE_OPTIONS[1:]"
    page.goto(f"{recipe('tool', 'mock', file_with('client_tool', more=mine)).url}/chatkit")
    expect(page.locator("#chat")).to_be_visible()
    assert options(page)["api"]["domainKey"] == 7
    page.clock.set_fixed_time("2026-02-03T12:00:00Z")
    answer = page.evaluate("chat.options.onClientTool({ name: 'local_time', params: {} })")
    assert answer == {"time": page.evaluate("new Date().toString()")}


def test_an_upload_of_the_recipe(page, recipe):
    server = recipe("images", "mock", USERS="alice:a")
    answer_prompts(page, "a")
    page.goto(f"{server.url}/chatkit")
    expect(page.locator("#chat")).to_be_visible()
    found = options(page)
    assert found["api"]["uploadStrategy"] == {"type": "direct", "uploadUrl": f"{server.url}/images"}
    attachments = found["composer"]["attachments"]
    assert attachments["enabled"] and {*attachments["accept"]} == {"image/png", "image/jpeg"}
    width = page.evaluate("""async () => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 7, height: 7 });
        const form = new FormData();
        form.append("file", await new Promise((done) => canvas.toBlob(done)), "a.png");
        const { api } = chat.options;
        const init = { method: "POST", body: form };
        const sent = await api.fetch(api.uploadStrategy.uploadUrl, init);
        const image = Object.assign(new Image(), { src: (await sent.json()).preview_url });
        await image.decode();
        return image.width;
    }""")
    assert width == 7


def test_a_login_of_the_recipe(page, recipe):
    """The server asks for no token, so the page does not ask, either."""
    jwt = pytest.importorskip("jwt")
    secret, port = "0123456789abcdef" * 2, str(free_port())
    url = f"http://127.0.0.1:{port}"
    recipe("login", "mock", SESSION_SECRET=secret, ALLOWED_ORIGINS=url, PORT=port)
    asked = answer_prompts(page)
    page.goto(f"{url}/chatkit")
    with page.expect_response(f"{url}/chatkit") as response:
        say(page, "Hello?")
    assert response.value.status == 401 and asked == []
    value = jwt.encode({"sub": "alice", "exp": time.time() + 60}, secret, "HS256")
    page.context.add_cookies([{"name": "session", "value": value, "url": url}])
    page.reload()
    say(page, "Hello!")
    expect(page.locator(".assistant")).to_have_count(1)
