"""The page at /melt, in a real browser, on the session's server."""

import shutil
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

QUESTION = (
    "Answer at once. Ann is in Rome. Gus is in Bern. Bob is with Ann. Hana is with Gus. "
    "Kim is with Bob. Jack is with Hana. Leo is in Oslo. Mia is with Leo. Where is Jack?"
)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as somebody sees it; nothing may fail in its script, or be loaded from elsewhere."""
    wrong, contexts = [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith((server, "data:")) or wrong.append(request.url))
        page.goto(f"{server}/melt")
        expect(page.locator("#state")).to_have_text("connected")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def ask(page, loops):
    page.fill("#prompt", QUESTION)
    page.fill("#loops", str(loops))
    page.click("#send")
    expect(page.locator("#said")).to_contain_text(f"at most {loops}")
    return page.inner_text("#answer")


def test_the_slider_changes_how_deep_the_answer_is(visit):
    page = visit()
    assert ask(page, 2) == "In Hana Gus Bern."
    assert ask(page, 4) == "In Bern."
    rows = page.locator("#histogram tbody tr")
    expect(rows.filter(has=page.locator("th", has_text="4"))).to_be_visible()
    expect(page.locator("#said")).to_contain_text("4.00 loops a token")


def test_it_works_by_keyboard_alone(visit):
    page = visit()
    page.keyboard.press("Tab")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Tab")
    expect(page.locator("#loops")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#loops-shown")).to_have_text("3")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).to_have_text("In Gus Bern.")


def test_live_numbers_follow_a_request(visit, client):
    page = visit()
    deep = {"ignore_eos": True, "vllm_xargs": {"loops": 4}}
    asked = threading.Thread(
        target=client.completions.create,
        kwargs={"model": "melt-demo", "prompt": QUESTION, "max_tokens": 600, "extra_body": deep},
    )
    asked.start()
    expect(page.locator("#running")).to_have_text("1")
    own, other = page.inner_text("#kv-own"), page.inner_text("#kv-other")
    asked.join()
    number = [float(text.split()[0]) for text in (own, other)]
    assert own.endswith("KiB") and number[1] == pytest.approx(4 * number[0] / (1024 if "MiB" in other else 1), rel=0.05)
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#kv-own")).to_have_text("0 B")


def test_an_answer_can_be_stopped_and_a_refusal_is_shown(visit):
    page = visit()
    page.fill("#prompt", "Jack " * 5000)
    page.click("#send")
    expect(page.locator("#said.alarm")).to_contain_text("maximum context length")
    page.fill("#prompt", QUESTION)
    page.fill("#loops", "1")  # too few: it goes on without end
    page.click("#send")
    page.click("#stop")
    expect(page.locator("#said")).to_have_text("stopped")
    expect(page.locator("#running")).to_have_text("0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_a_screen_reader(visit, scheme):
    page = visit(color_scheme=scheme, bypass_csp=True)  # for the checker's own script
    ask(page, 4)
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_it_fits_a_telephone(visit):
    page = visit(viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
