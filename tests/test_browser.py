"""The page at GET /chatkit, in a real browser.

The browser is the system's Chromium. OpenAI's script is answered by a stand-in that shows a chat.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import jwt
import pytest

from client import NO_TLS, ROOT, SUPPORT, Chat, done, free_port, text_of
from conftest import USERS

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
NOT_LOADED = f"ChatKit could not be loaded. It needs {SCRIPT}"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@contextmanager
def page_in(browser, script: str | None = STAND_IN) -> Iterator[Page]:
    """A page in a session of its own, which fails the test if a script on it does."""
    context = browser.new_context(viewport={"width": 640, "height": 400})
    page = context.new_page()
    errors: list = []
    page.on("pageerror", lambda error: errors.append(error))

    def answer(route: Route) -> None:
        if script is None:
            route.abort()
        else:
            route.fulfill(content_type="text/javascript", body=script)

    page.route(SCRIPT, answer)
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def page(browser) -> Iterator[Page]:
    with page_in(browser) as page:
        yield page


def say(page: Page, text: str) -> None:
    page.get_by_placeholder("Message the AI").fill(text)
    page.keyboard.press("Enter")


def options(page: Page):
    """What the page passed to setOptions; a function counts as true."""
    script = "JSON.stringify(chat.options, (key, value) => typeof value == 'function' || value)"
    return httpx.Response(200, text=page.evaluate(script)).json()


def canned_reply(server) -> str:
    (reply,) = done(Chat(server.url).say("hello"))
    return text_of(reply)


def test_a_chat(page, servers):
    server = servers("workers")
    url, reply = f"{server.url}/chatkit", canned_reply(server)
    page.goto(f"{url}?theme=dark#top")
    say(page, "Hello!")
    expect(page.locator(".user")).to_have_text("Hello!")
    expect(page.locator(".assistant")).to_have_text(reply)
    say(page, "And again.")
    expect(page.locator(".user")).to_have_text(["Hello!", "And again."])
    expect(page.locator(".assistant")).to_have_text([reply, reply])
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#login")).to_be_hidden()
    assert page.locator("#chat").bounding_box() == {"x": 0, "y": 0, "width": 640, "height": 400}
    assert options(page) == {"api": {"url": url, "domainKey": DOMAIN_KEY, "fetch": True}}
    if path := os.getenv("SCREENSHOT"):
        page.screenshot(path=path)


def test_under_a_path_prefix(page, servers):
    """As behind a proxy that takes the prefix away."""
    server = servers("workers")
    prefixed = f"{server.url}/some/where"

    def forward(route: Route) -> None:
        url = route.request.url.replace(prefixed, server.url)
        route.fulfill(response=route.fetch(url=url))

    page.route(f"{prefixed}/**", forward)
    page.goto(f"{prefixed}/chatkit")
    say(page, "Hello!")
    expect(page.locator(".assistant")).to_have_text(canned_reply(server))
    assert options(page)["api"]["url"] == f"{prefixed}/chatkit"


def test_without_openai_s_script(browser, servers):
    with page_in(browser, script=None) as page:
        page.goto(f"{servers('workers').url}/chatkit")
        expect(page.locator("#notice")).to_have_text(NOT_LOADED)
        expect(page.locator("#chat")).to_be_hidden()


def test_the_token_is_asked_for(page, servers, provider):
    url = f"{servers('page').url}/chatkit"
    page.goto(url)
    notice, token = page.locator("#notice"), page.get_by_label("Token")
    reason = httpx.post(url, verify=NO_TLS, content="").json()["detail"]
    expect(notice).to_have_text(reason)
    expect(page.locator("#chat")).to_be_hidden()
    token.fill("nobody")
    with page.expect_response(url) as response:
        token.press("Enter")
    assert response.value.status == 401
    expect(page.locator("#chat")).to_be_hidden()
    token.fill(USERS["alice"])
    token.press("Enter")
    say(page, "Hello!")
    expect(page.locator(".assistant")).to_have_text("You said: Hello!")
    expect(notice).to_be_hidden()
    expect(token).to_be_hidden()

    # The token is known until the tab is closed; when the server takes it no longer, the page asks.
    page.reload()
    say(page, "Again!")
    expect(page.locator(".assistant")).to_have_text("You said: Again!")
    page.evaluate("sessionStorage.token = 'Bearer old'")
    say(page, "Once more!")
    expect(notice).to_have_text(reason)
    expect(token).to_be_visible()
    expect(page.locator("#chat")).to_be_hidden()


def test_the_token_is_told_to_this_server_only(page, servers, provider):
    page.goto(f"{servers('page').url}/chatkit")
    page.get_by_label("Token").fill(USERS["alice"])
    page.keyboard.press("Enter")
    expect(page.locator("#chat")).to_be_visible()
    told: list = []

    def answer(route: Route) -> None:
        told.append(route.request.headers.get("authorization"))
        route.fulfill(headers={"Access-Control-Allow-Origin": "*"}, body="{}")

    page.route("https://files.example/**", answer)
    page.evaluate("chat.options.api.fetch('https://files.example/upload')")
    page.evaluate("chat.options.api.fetch('/health')")
    assert told == [None]


def test_the_page_needs_no_token_and_holds_none(servers):
    for name in ("users", "workers"):
        response = httpx.get(f"{servers(name).url}/chatkit", verify=NO_TLS)
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert SCRIPT in response.text
        assert not [token for token in USERS.values() if token in response.text]


def test_a_client_tool_of_the_recipe(page, recipe):
    server = recipe("client_tool", "mock")
    page.goto(f"{server.url}/chatkit")
    expect(page.locator("#chat")).to_be_visible()
    api = {"url": f"{server.url}/chatkit", "domainKey": DOMAIN_KEY, "fetch": True}
    assert options(page) == {"onClientTool": True, "api": api}
    page.clock.set_fixed_time("2026-02-03T12:00:00Z")
    call = "chat.options.onClientTool({ name: 'local_time', params: {} })"
    answer = page.evaluate(call)
    assert answer == {"time": page.evaluate("new Date().toString()")}
    assert answer["time"].startswith("Tue Feb 03 2026 ")


def test_an_upload_of_the_recipe(page, recipe):
    server = recipe("images", "mock", CHATKIT_TOKENS="alice:token-of-alice")
    page.goto(f"{server.url}/chatkit")
    page.get_by_label("Token").fill(USERS["alice"])
    page.keyboard.press("Enter")
    expect(page.locator("#chat")).to_be_visible()
    found = options(page)
    assert found["api"]["uploadStrategy"] == {"type": "direct", "uploadUrl": f"{server.url}/images"}
    assert found["composer"]["attachments"] == {
        "enabled": True,
        "accept": {"image/png": [".png"], "image/jpeg": [".jpg", ".jpeg"]},
        "maxSize": 4 * 1024 * 1024,
    }
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
    secret = "0123456789abcdef0123456789abcdef"
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    recipe("login", "mock", SESSION_SECRET=secret, ALLOWED_ORIGINS=url, PORT=port)
    page.goto(f"{url}/chatkit")
    expect(page.locator("#notice")).to_have_text("Please log in.")
    expect(page.locator("#login")).to_be_hidden()
    value = jwt.encode({"sub": "alice", "exp": time.time() + 60}, secret, "HS256")
    page.context.add_cookies([{"name": "session", "value": value, "url": url}])
    page.reload()
    say(page, "Hello!")
    expect(page.locator(".assistant")).to_have_count(1)
