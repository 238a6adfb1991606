"""The pictures of the docs, taken of the page with the default collection in headless Chromium.

python docs/screenshots.py
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT))


def ask(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")
    expect(page.locator(".turn").last.locator(".t").first).to_be_attached(timeout=60_000)
    expect(page.locator("#status")).to_have_text("ready", timeout=300_000)


def main() -> None:
    from benchmarks.serving import serving

    IMAGES.mkdir(exist_ok=True)
    with serving(None) as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="light")
        page.goto(url)
        page.fill("#tokens", "160")
        ask(page, "What is 17 + 25?")
        ask(page, "Write a Python function that returns that sum.")
        page.locator(".t.overruled:visible").last.hover()
        page.screenshot(path=IMAGES / "page.png")
        page.select_option("#compare", index=3)
        ask(page, "Name three uses of a brick.")
        page.locator(".t").last.hover()
        page.screenshot(path=IMAGES / "compare.png")
        dark = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        dark.goto(url)
        dark.fill("#tokens", "60")
        ask(dark, "What is 17 + 25?")
        dark.screenshot(path=IMAGES / "narrow-dark.png")
        browser.close()


if __name__ == "__main__":
    main()
