"""Each tab, used in a browser as a person would: mouse, keyboard, files, a phone, two visitors.

One server and one page for all tests, since starting them takes most of the time. Needs the extra `app`,
playwright and Debian's `chromium` (another: CHROMIUM names it).
"""

import base64
import json
import os
import re
import shutil
import threading
import urllib.request
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from app.conftest import CLASSES
from app.test_inputs import bomb

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'flowback-nf[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")

from flowback import Sampler  # noqa: E402
from flowback.app.flows import Flows  # noqa: E402
from flowback.app.server import listen, server  # noqa: E402
from flowback.data.pixels import to_bytes  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in"),
    pytest.mark.filterwarnings("ignore"),  # other packages' own
]


@pytest.fixture(scope="module")
def flows(runs):
    return Flows([runs / "first", runs / "second"])


@pytest.fixture(scope="module")
def address(flows):
    with listen("127.0.0.1", 0) as sock:
        serving = server(flows)
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        serving.should_exit = True
        thread.join(10)


PATIENCE = 120_000
"""Milliseconds until the page should have answered, however busy the machine is."""


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield opened
        opened.close()


def new_page(browser, address, asked=None, **options):
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    opened = context.new_page()
    if asked is not None:
        opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#draw-button")
    return opened


@pytest.fixture(scope="module")
def asked():
    """Addresses that the page asked for."""
    return []


@pytest.fixture(scope="module")
def page(browser, address, asked):
    return new_page(browser, address, asked, viewport={"width": 1200, "height": 900})


def open_tab(page, name):
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():  # on a phone some are in a menu
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()


def images(page, result, count):
    """What a result shows, once it shows so many: the pixels and the names."""
    found = page.locator(f"#{result} figure")
    playwright.expect(found).to_have_count(count)
    sources = found.locator("img").evaluate_all("all => all.map(one => one.src)")
    pixels = [np.array(Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))) for url in sources]
    return np.stack(pixels), found.locator("figcaption").all_inner_texts()


def expected(drawn):
    return to_bytes(drawn)[:, 0].numpy()


def choose(page, label, option):
    page.get_by_label(label, exact=True).locator("visible=true").first.click()
    page.get_by_role("option", name=option).click()


def set_number(page, label, value):
    page.get_by_label(label, exact=True).locator("visible=true").first.fill(str(value))


def value_of(page, field, what):
    """The canvas of a picture field, at one of its pixels."""
    return page.evaluate(
        f"document.querySelector('#{field} canvas').getContext('2d').getImageData({what}, 1, 1).data[0]"
    )


def test_draw_shows_the_samples_of_the_flow(page, flows):
    choose(page, "Class", "dog")
    set_number(page, "Seed", 5)
    page.locator("#draw-button").focus()
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#draw-result .fb-text")).to_have_text("Denoised.")
    pixels, names = images(page, "draw-result", 16)
    assert names[0] == "dog, seed 5"
    drawn = flows.own.sample(["dog"] * 16, range(5, 21), guidance=1.0)
    assert np.abs(pixels.astype(int) - expected(drawn)).max() <= 1  # of 255: rounding of another batch


def test_a_mistake_is_a_sentence(page):
    choose(page, "Class", "no class")
    page.locator("#draw-button").click()
    alert = page.locator("#draw-result [role=alert]")
    playwright.expect(alert).to_have_text("Guidance needs a class: choose one, or set guidance to 0.")


def test_the_trajectory_goes_from_noise_to_the_sample(page, flows):
    open_tab(page, "Trajectory")
    page.locator("#trajectory-button").click()
    pixels, names = images(page, "trajectory-result", 4)
    assert names == ["noise", "after block 2", "after block 1", "denoised"]
    drawn = flows.own.sample(["cat"], [0], guidance=1.0)
    assert np.abs(pixels[3].astype(int) - expected(drawn)[0]).max() <= 1


def test_a_drawing_is_read(page):
    open_tab(page, "Read")
    stage = page.locator("#read-picture canvas").bounding_box()
    page.mouse.move(stage["x"] + 60, stage["y"] + 60)
    page.mouse.down()
    page.mouse.move(stage["x"] + 200, stage["y"] + 60, steps=4)
    page.mouse.up()
    assert value_of(page, "read-picture", "130, 60") == 255
    page.locator("#read-button").click()
    pixels, names = images(page, "read-result", 4)
    assert names == ["image", "with noise", "its z", "decoded from z"]
    assert pixels[0][1, 2:5].min() > 100
    assert pixels[0][5:].max() < 30
    text = page.locator("#read-result").inner_text()
    assert re.search(r"\d\.\d{3} bits/dim", text)
    assert page.locator("#read-result tr th").all_inner_texts() == list(CLASSES)
    assert page.locator("#read-result .fb-best").count() == 1


def test_a_file_is_shown_as_the_flow_sees_it(page, tmp_path):
    Image.fromarray(np.kron(np.eye(2), np.full((50, 50), 200)).astype(np.uint8)).save(tmp_path / "a.png")
    page.set_input_files("#read-picture input[type=file]", tmp_path / "a.png")
    page.wait_for_function(
        "() => document.querySelector('#read-picture canvas').getContext('2d')"
        ".getImageData(20, 20, 1, 1).data[0] === 200"
    )
    assert value_of(page, "read-picture", "250, 20") == 0
    page.locator("#read-picture .fb-clear").click()
    assert value_of(page, "read-picture", "20, 20") == 0


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bomb.png", bomb(), "too many pixels"),
        ("setup.exe", b"MZ" * 999, "not an image"),
        ("large.png", None, "larger than 8 MB"),
    ],
)
def test_hostile_files_get_a_sentence(page, tmp_path, name, content, sentence):
    with (tmp_path / name).open("wb") as file:
        file.write(content or b"")
        file.truncate(len(content) if content else 100 * 2**20)
    page.set_input_files("#read-picture input[type=file]", tmp_path / name)
    playwright.expect(page.locator("#read-picture [role=alert]")).to_contain_text(sentence)


def test_the_way_between_two_samples(page, flows):
    open_tab(page, "Interpolate")
    page.locator("#first-picture-sample").click()
    page.wait_for_function("() => document.querySelector('#first-picture .fb-filled')")
    page.locator("#interpolate-button").click()
    pixels, names = images(page, "interpolate-result", 9)
    assert (names[0], names[4], names[8]) == ("0%", "50%", "100%")
    assert len({picture.tobytes() for picture in pixels}) == 9


def test_redraw_what_is_marked_with_the_keyboard(page, flows):
    open_tab(page, "Inpaint")
    page.locator("#inpaint-button").click()
    alert = page.locator("#inpaint-result [role=alert]")
    playwright.expect(alert).to_have_text("Nothing is marked: mark what is to be redrawn.")
    page.locator("#inpaint-picture .fb-tokens input").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.locator("#inpaint-picture-sample").click()
    page.wait_for_function("() => document.querySelector('#inpaint-picture .fb-filled')")
    marked = page.locator("#inpaint-picture .fb-tokens input:checked")
    assert marked.evaluate_all("all => all.map(one => one.ariaLabel)") == [
        "row 1, column 2",
        "row 2, column 2",
    ]
    page.locator("#inpaint-button").click()
    (before, *after), names = images(page, "inpaint-result", 5)
    assert names[0] == "before"
    mask = np.zeros((8, 8), bool)
    mask[0:4, 2:4] = True
    assert all((picture[~mask] == before[~mask]).all() for picture in after)
    assert all((picture[mask] != before[mask]).any() for picture in after)
    assert "The kept part is yours, unchanged." in page.locator("#inpaint-result").inner_text()


def test_mark_by_dragging_and_by_region(page):
    open_tab(page, "Inpaint")
    page.locator("#inpaint-picture .fb-clear").click()
    stage = page.locator("#inpaint-picture canvas").bounding_box()
    page.mouse.move(stage["x"] + 35, stage["y"] + 35)
    page.mouse.down()
    page.mouse.move(stage["x"] + 245, stage["y"] + 35, steps=8)
    page.mouse.up()
    marked = page.locator("#inpaint-picture .fb-tokens input:checked")
    assert marked.count() == 4
    page.get_by_role("button", name="Middle").click()
    assert marked.evaluate_all("all => all.map(one => one.ariaLabel)")[0] == "row 2, column 2"


def test_two_flows_on_the_same_seeds(page, flows):
    open_tab(page, "Compare")
    choose(page, "Second flow", "second, step 5")
    page.locator("#compare-button").click()
    last = page.locator("#compare-result .fb-text").last
    playwright.expect(last).to_have_text("second, step 5: denoised.")
    pixels, names = images(page, "compare-result", 20)
    assert names[:10] == names[10:]
    drawn = flows["second, step 5"].sample([k % 3 for k in range(10)], range(10), guidance=1.0)
    assert np.abs(pixels[10:].astype(int) - expected(drawn)).max() <= 1


def test_nothing_was_asked_of_other_machines_and_no_path_was_shown(page, address, asked, runs):
    local = [url for url in asked if url.startswith((address, "data:", "blob:"))]
    assert local == asked
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = answer.read().decode()
    for secret in (str(runs), "secret-place", os.getcwd(), os.path.expanduser("~"), "site-packages"):
        assert secret not in config
        assert secret not in page.content()


def test_a_phone_in_the_dark(browser, address):
    size = {"width": 360, "height": 740}
    phone = new_page(browser, address, viewport=size, color_scheme="dark", has_touch=True, is_mobile=True)
    for name in ("Trajectory", "Read", "Interpolate", "Inpaint", "Compare", "Draw"):
        open_tab(phone, name)
        assert phone.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
    phone.locator("#draw-button").tap()
    images(phone, "draw-result", 16)
    last = "document.querySelector('#draw-result figure:last-child')"
    phone.wait_for_function(f"{last}.getBoundingClientRect().bottom <= innerHeight")  # the page has scrolled
    assert phone.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    background = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
    phone.close()


def test_visitors_wait_in_turn(browser, address, monkeypatch):
    inside, most, follow = [], [], Sampler.follow

    def watched(sampler, *options):
        inside.append(1)
        most.append(len(inside))
        yield from follow(sampler, *options)
        inside.pop()

    monkeypatch.setattr(Sampler, "follow", watched)
    visitors = [new_page(browser, address) for _ in range(3)]
    for visitor in visitors:
        visitor.locator("#draw-button").click()
    for visitor in visitors:
        playwright.expect(visitor.locator("#draw-result .fb-text")).to_have_text("Denoised.")
        visitor.close()
    assert most == [1, 1, 1]


def test_what_no_page_would_send(address):
    """A program that talks to the queue itself gets a sentence, and learns nothing of the machine."""

    def post(index, data):
        body = json.dumps({"data": data, "fn_index": index, "session_hash": "x", "event_data": None})
        request = urllib.request.Request(
            f"{address}/gradio_api/queue/join", body.encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request).read()
        with urllib.request.urlopen(
            f"{address}/gradio_api/queue/data?session_hash=x", timeout=PATIENCE / 1000
        ) as answer:
            return answer.read().decode()

    with urllib.request.urlopen(f"{address}/config") as answer:
        functions = json.loads(answer.read())["dependencies"]
    assert len(functions) == 14
    for function in functions:
        count = len(function["inputs"])
        for value in ("/etc/passwd", None, {"a": [1]}, 1e308):
            said = post(function["id"], [value] * count)
            assert "Traceback" not in said
            assert not re.search(r"/(home|root|usr|tmp|work|opt)/|site-packages|\.py", said), said
    assert torch.is_grad_enabled()
