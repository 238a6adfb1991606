"""The page in a real browser."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.serving.conftest import Live, Start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY = re.compile("ready")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "the page is tested in Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def slow(start: Start) -> Live:
    """A server that takes its time, as real models do."""
    live = start()
    step = live.engine.step

    def later() -> Any:
        time.sleep(0.02)
        return step()

    live.engine.step = later
    return live


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A function that opens the page of a server; it fails if the page asks anybody else or an error is logged."""
    pages: list[tuple[Page, str, list[str], list[str]]] = []

    def go(url: str, **settings: Any) -> Page:
        page = browser.new_page(**settings)
        asked: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator("#status")).to_have_text(READY)
        pages.append((page, url, asked, errors))
        return page

    yield go
    for page, url, asked, errors in pages:
        assert not errors
        assert all(each.startswith((url, "blob:", "data:")) for each in asked), asked
        page.close()


def ask(page: Page, text: str = "How many cows?", tokens: int = 12, wait: bool = True) -> None:
    page.fill("#tokens", str(tokens))
    page.fill("#message", text)
    page.press("#message", "Enter")
    if wait:
        expect(page.locator(".turn").last.locator(".t").first).to_be_attached()
        expect(page.locator("#status")).to_have_text(READY)


def test_type_and_stream(live: Live, slow: Live, visit: Callable[..., Page]) -> None:
    page = visit(slow.url)
    page.evaluate("window.seen = []; new MutationObserver(() => seen.push(document.querySelectorAll('.t').length))"
                  ".observe(document.getElementById('turns'), {childList: true, subtree: true})")  # fmt: skip
    ask(page)
    tokens = page.locator(".t")
    assert 1 <= tokens.count() <= 12
    counts = page.evaluate("seen")
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    experts = set(live.service.experts)
    assert {page.evaluate("i => document.querySelectorAll('.t')[i].getAttribute('aria-label')", i).split(", ")[1]
            for i in range(tokens.count())} <= experts  # fmt: skip
    assert page.locator(".strip span").count() == tokens.count()
    shares = [int(text.split()[0]) for text in page.locator(".share").all_inner_texts()]
    assert 98 <= sum(shares) <= 102
    ask(page, "And then?")
    assert page.locator(".turn").count() == 2


def test_point_at_a_token_and_walk(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(live.url)
    ask(page)
    page.locator(".t").nth(1).hover()
    expect(page.locator("#token .weight")).to_have_count(2)
    expect(page.locator("#token tr")).to_have_count(6)
    assert "%" in page.locator("#token tr").nth(1).inner_text()
    page.locator(".t").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    assert page.locator(".t.chosen").count() == 1


def test_everything_is_reached_by_keyboard(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(live.url)
    ask(page)
    reached = set()
    page.locator("#message").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"send", "policy", "compare", "alpha", "temperature", "tokens", "clear", "export-json"} <= reached
    assert any("t e" in str(each) for each in reached)


def test_stop(slow: Live, visit: Callable[..., Page]) -> None:
    page = visit(slow.url)
    ask(page, tokens=400, wait=False)
    expect(page.locator(".t").nth(3)).to_be_attached()
    page.click("#stop")
    expect(page.locator("#status")).to_have_text(READY)
    expect(page.locator(".figures")).to_contain_text("stopped")
    assert page.locator(".t").count() < 300
    assert slow.idle(3)


def test_compare(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(live.url)
    page.select_option("#compare", "tiny@expert=math,alpha=0")
    ask(page)
    answers = page.locator("article.answer")
    expect(answers).to_have_count(2)
    assert answers.nth(1).locator("h3").inner_text() == "math alone"
    assert set(answers.nth(1).locator(".t").evaluate_all("all => all.map(t => t.className.split(' ')[1])")) == {"e0"}
    answers.nth(1).locator(".t").last.hover()
    expect(page.locator("#token")).to_contain_text("the router was not asked")
    expect(page.locator("#token th")).to_have_count(1)


def test_alpha_changes_the_answer(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(live.url)
    ask(page)
    page.evaluate(
        "document.getElementById('alpha').value = 0; document.getElementById('alpha').dispatchEvent(new Event('input'))"
    )
    assert page.locator("#alpha-value").inner_text() == "0"
    ask(page)
    texts = page.locator(".text").all_inner_texts()
    assert texts[0] != texts[1]
    assert page.locator("article").nth(1).locator(".overruled").count() == 0


def test_reload_during_a_stream(slow: Live, visit: Callable[..., Page]) -> None:
    page = visit(slow.url)
    ask(page, tokens=400, wait=False)
    expect(page.locator(".t").nth(5)).to_be_attached()
    page.reload()
    expect(page.locator("#status")).to_have_text(READY)
    assert page.locator(".t").count() >= 5
    assert set(page.locator("#legend .share").all_text_contents()) != {"0 %"}
    assert slow.idle(3)
    ask(page, tokens=5)
    assert page.locator(".turn").count() == 2


def test_a_refusal_is_shown_as_one(start: Start, visit: Callable[..., Page]) -> None:
    page = visit(start(key="sesame").url)
    ask(page, wait=False)
    expect(page.get_by_role("alert")).to_contain_text("API key")
    expect(page.locator("#status")).to_have_text(READY)
    page.fill("#key", "sesame")
    ask(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_after_a_refusal_the_conversation_goes_on(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(live.url)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body="{}"))
    ask(page, "first", wait=False)
    expect(page.get_by_role("alert")).to_contain_text("500")
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "second")
    assert [m["content"] for m in request.value.post_data_json["messages"]] == ["second"]
    assert "alpha" not in request.value.post_data_json


def test_export(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(live.url)
    ask(page, "A <b>bold</b> question & more")
    with page.expect_download() as download:
        page.click("#export-json")
    found = json.loads(Path(download.value.path()).read_text())
    assert found["turns"][0]["message"] == "A <b>bold</b> question & more"
    assert len(found["turns"][0]["answers"][0]["tokens"]) == page.locator(".t").count()
    with page.expect_download() as download:
        page.click("#export-html")
    text = Path(download.value.path()).read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    alone = page.context.browser.new_page()  # type: ignore[union-attr]
    alone.set_content(text)
    assert alone.locator(".t").all_text_contents() == page.locator(".t").all_text_contents()
    assert alone.locator("b").count() == 0
    alone.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 700, 1280])
def test_it_fits(live: Live, visit: Callable[..., Page], scheme: str, width: int) -> None:
    page = visit(live.url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    ask(page)
    wide = "all => all.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id || e.tagName)"
    assert page.locator("body *").evaluate_all(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text, back = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    assert contrast(text, back) >= 7
    dim = page.evaluate("getComputedStyle(document.querySelector('.figures')).color")
    assert contrast(dim, back) >= 4.5


def contrast(a: str, b: str) -> float:
    """WCAG 2's ratio of two `rgb(…)` colours."""

    def luminance(colour: str) -> float:
        parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_server_that_dies_and_comes_back(folder: Path, browser: Browser, tmp_path: Path) -> None:
    from tests.serving.conftest import free_port, spawn

    port = free_port()
    log = tmp_path / "log"

    def begin() -> subprocess.Popen[bytes]:
        return spawn(folder, port, log, OMP_NUM_THREADS="1")

    server = begin()
    page = browser.new_page()
    try:
        until = time.monotonic() + 60
        while True:
            try:
                page.goto(f"http://127.0.0.1:{port}/")
                break
            except Exception:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.2)
        expect(page.locator("#status")).to_have_text(READY, timeout=30_000)
        # Frozen in the middle, so that the answer cannot end before the server does.
        ask(page, tokens=400, wait=False)
        expect(page.locator(".t").first).to_be_attached()
        server.send_signal(signal.SIGSTOP)
        server.kill()
        server.wait()
        if page.locator("#status").inner_text() == "ready":
            pytest.fail("the answer ended before the server was killed")
        expect(page.get_by_role("alert")).to_contain_text("broke off")
        expect(page.locator("#status")).to_contain_text("waiting for it")
        server = begin()
        expect(page.locator("#status")).to_contain_text("back", timeout=60_000)
        ask(page, tokens=5)
        assert page.locator(".turn").count() == 2
    finally:
        page.close()
        server.kill()
        server.wait()
