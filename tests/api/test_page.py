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


def answer_with(page, *events):
    """Let the server's answer to a question be this stream; what no healthy server sends."""
    body = "".join(f"{event}\n\n" for event in events)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.fill("#prompt", "Where is Jack?")
    page.click("#send")


def piece(text, finish="null"):
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": {finish}}}]}}'


def test_comments_that_keep_a_stream_open_are_no_part_of_the_answer(visit):
    page = visit()
    answer_with(page, ": keep-alive", piece("In "), ": keep-alive", piece("Bern.", '"stop"'), "data: [DONE]")
    expect(page.locator("#answer")).to_have_text("In Bern.")
    expect(page.locator("#said")).to_contain_text("first token after")
    expect(page.locator("#said")).not_to_contain_text("Cut")


@pytest.mark.parametrize(
    ("finish", "rest", "said"),
    [
        ("null", [], "the connection ended before the answer"),
        ('"abort"', ["data: [DONE]"], "the server ended it early"),
        ('"length"', ["data: [DONE]"], "512 tokens"),
    ],
)
def test_what_cuts_an_answer_short_is_said(visit, finish, rest, said):
    page = visit()
    answer_with(page, piece("In", finish), *rest)
    expect(page.locator("#said")).to_contain_text("Cut: ")
    expect(page.locator("#said")).to_contain_text(said)


def test_numbers_of_a_server_that_is_gone_are_grey(visit):
    page = visit()
    page.context.set_offline(True)
    expect(page.locator("#state.alarm")).to_contain_text("does not answer; trying again; the numbers are of ")
    grey = page.evaluate(
        "[getComputedStyle(document.querySelector('#kv-own')).color, "
        "getComputedStyle(document.querySelector('.facts dt')).color]"
    )
    assert grey[0] == grey[1]
    page.context.set_offline(False)
    expect(page.locator("#state")).to_have_text("connected")
    assert page.evaluate("getComputedStyle(document.querySelector('#kv-own')).color") != grey[0]


def test_the_legend_has_the_colours_of_the_lines(visit):
    page = visit()
    for which in ("own", "other"):
        label, line = page.evaluate(
            f"[getComputedStyle(document.querySelector('dt.{which}')).color, "
            f"getComputedStyle(document.querySelector('#line-{which}')).stroke]"
        )
        assert label == line


def test_the_ratio_and_the_ends_of_the_slider_are_said_in_words(visit):
    page = visit()
    expect(page.locator("#ratio")).to_have_text("A LoopLM of this shape needs 4.0 times the memory for each token.")
    expect(page.locator("#loops-ends")).to_contain_text("1, the fastest")
    expect(page.locator("#loops-most")).to_contain_text("the deepest")


@pytest.mark.parametrize("width", [360, 1280, 2560])
def test_a_long_name_wraps_on_every_screen(visit, width):
    page = visit(viewport={"width": width, "height": 800})

    def with_a_long_name(route):
        facts = route.fetch().json()
        route.fulfill(json={**facts, "models": ["m" * 300]})

    page.route("**/melt/info", with_a_long_name)
    page.reload()
    expect(page.locator("#model")).to_have_text("m" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, dt, dd, th, span, text')]"
        ".filter((each) => each.textContent.trim() && each.getClientRects().length)"
        ".map((each) => parseFloat(getComputedStyle(each).fontSize)))"
    )
    assert smallest >= 14 and page.locator("#history").bounding_box()["height"] > 150
