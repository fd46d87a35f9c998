"""The page at /melt, in a real browser, on the session's server."""

import json
import os
import re
import shutil
import subprocess
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


def newest(page, what):
    return page.locator(f".turn:last-child {what}")


def ask(page, loops, question=QUESTION):
    page.fill("#prompt", question)
    page.fill("#loops", str(loops))
    page.click("#send")
    expect(newest(page, ".said").first).to_contain_text(f"at most {loops}")
    expect(page.locator("#send")).to_be_enabled()
    return newest(page, ".answer").first.inner_text()  # "Answer at once": without reasoning


def ask_side_by_side(page, loops, beside):
    page.check("#beside")
    page.fill("#loops-beside", str(beside))
    ask(page, loops)
    return newest(page, ".answer").all_inner_texts()


def test_the_slider_changes_how_deep_the_answer_is(visit):
    page = visit()
    assert ask(page, 2) == "In Hana Gus Bern."
    assert ask(page, 4) == "In Bern."
    rows = page.locator("#histogram tbody tr")
    expect(rows.filter(has=page.locator("th", has_text="4"))).to_be_visible()
    expect(newest(page, ".said")).to_contain_text("4.00 loops a token")


@pytest.mark.parametrize(("width", "stacked"), [(1280, False), (360, True)])
def test_two_depths_answer_side_by_side_or_stacked_on_a_telephone(visit, width, stacked):
    page = visit(viewport={"width": width, "height": 800})
    assert ask_side_by_side(page, 4, 2) == ["In Bern.", "In Hana Gus Bern."]
    for which, loops in enumerate((4, 2)):
        reply = newest(page, ".reply").nth(which)
        expect(reply.locator("h3")).to_have_text(f"{loops} loops")
        for told in (" tokens", f"{loops}.00 loops a token", "first token after", "all after"):
            expect(reply.locator(".said")).to_contain_text(told)
    left, right = (newest(page, ".reply").nth(which).bounding_box() for which in (0, 1))
    assert (left["x"] == right["x"], left["y"] == right["y"]) == (stacked, not stacked)


def test_the_conversation_is_sent_outlives_a_reload_and_is_cleared(visit, client):
    page = visit()
    sent = []
    page.on("request", lambda each: each.url.endswith("completions") and sent.append(each.post_data_json["messages"]))
    mine = [{"role": "user", "content": QUESTION}]
    ask(page, 4)
    assert sent == [mine]  # the bundled model was trained on single questions

    page.check("#whole")
    page.fill("#prompt", "Jack " * 5000)  # refused: no part of the conversation
    page.click("#send")
    expect(page.locator(".said.alarm")).to_be_visible()
    second = "Answer at once. Eve is in Oslo. Where is Eve?"
    said = ask(page, 4, second)
    messages = [*mine, {"role": "assistant", "content": "In Bern."}, {"role": "user", "content": second}]
    assert sent[-1] == messages
    depth = {"vllm_xargs": {"loops": 4}}
    answer = client.chat.completions.create(
        model="melt-demo", messages=messages, temperature=0, max_tokens=512, extra_body=depth
    )
    assert said == answer.choices[0].message.content
    expect(page.locator("#prompt")).to_have_value("")

    page.reload()
    questions = [each.strip() for each in page.locator(".question").all_inner_texts()]
    assert questions == [QUESTION, ("Jack " * 5000).strip(), second]
    expect(newest(page, ".answer")).to_have_text(said)
    expect(newest(page, ".said")).to_contain_text("4.00 loops a token")
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.locator("#state")).to_have_text("connected")
    page.check("#whole")
    ask(page, 4)
    assert sent[-1] == mine and page.locator(".turn").count() == 1

    page.route("**/completions", lambda route: None)  # never answered
    page.fill("#prompt", second)
    page.click("#send")
    expect(page.locator(".turn")).to_have_count(2)
    page.reload()
    expect(newest(page, ".said.alarm")).to_have_text(re.compile(r"^Cut: (the page was left|the connection broke)"))
    page.unroute("**/completions")

    page.add_init_script("sessionStorage.setItem('melt-conversation', '[{}]')")  # what another version may have kept
    page.reload()
    expect(page.locator("#state")).to_have_text("connected")
    expect(page.locator(".turn")).to_have_count(0)


def test_an_answer_can_be_had_again_by_curl_without_the_key_in_the_line(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("sessionStorage.setItem('melt-key', 'sesame')")
    page.reload()
    expect(page.locator("#state")).to_have_text("connected")
    said = ask(page, 3, QUESTION.replace("Ann is", "Ann's") + ' "$HOME" `date` \\')
    newest(page, "summary").click()
    button = newest(page, ".curl button")
    button.click()
    expect(button).to_have_text("Copied")
    line = page.evaluate("navigator.clipboard.readText()")
    assert "\n" not in line and '"loops":3' in line and "sesame" not in line and "$VLLM_API_KEY" in line
    run = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "VLLM_API_KEY": "x"})
    events = [json.loads(each[6:]) for each in run.stdout.splitlines() if each.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    again = "".join((delta.get("reasoning") or "") + (delta.get("content") or "") for delta in deltas)
    assert again and again.replace("\n", "") == said.replace("\n", "")
    assert events[-1]["usage"]["loops"]["max"] == 3

    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as by HTTP from elsewhere
    button.click()
    expect(button).to_contain_text("Selected")
    assert page.evaluate("getSelection().toString()") == line


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
    expect(page.locator(".answer")).to_have_text("In Gus Bern.")


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
    expect(page.locator(".said.alarm")).to_contain_text("maximum context length")
    page.fill("#prompt", QUESTION)
    page.fill("#loops", "1")  # too few: it goes on without end
    page.click("#send")
    page.click("#stop")
    expect(newest(page, ".said")).to_have_text("stopped")
    expect(page.locator("#running")).to_have_text("0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_a_screen_reader(visit, scheme):
    page = visit(color_scheme=scheme, bypass_csp=True)  # for the checker's own script
    ask_side_by_side(page, 4, 2)
    newest(page, "summary").first.click()
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_it_fits_a_telephone(visit):
    page = visit(viewport={"width": 360, "height": 700})
    ask_side_by_side(page, 4, 2)
    newest(page, "summary").first.click()
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
    expect(page.locator(".answer")).to_have_text("In Bern.")
    expect(page.locator(".said")).to_contain_text("first token after")
    expect(page.locator(".said")).not_to_contain_text("Cut")


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
    expect(page.locator(".said")).to_contain_text("Cut: ")
    expect(page.locator(".said")).to_contain_text(said)


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
