"""The page of eqim-serve in Chromium: what a person does with it."""

import base64
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "target" / "clients"
PHOTOGRAPH = ROOT / "assets" / "photos" / "mountain" / "fog.jpg"
# Milliseconds. Two busy cores take long.
PATIENCE = 60_000
# A long image with many steps: there is time to do something while it is generated.
LONG = {"seed": 3, "guidance": 3, "steps": 50, "tokens": 128}
WIDTH = 16 * LONG["tokens"]
SHORT = {"seed": 3, "guidance": 3, "steps": 10, "tokens": 48}

# The number of columns that were drawn.
DRAWN = """() => {
    const first_row = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, 1).data;
    const is_drawn = (value, index) => index % 4 === 3 && value > 0;
    const canvases = [...document.querySelectorAll("#track canvas")];
    return canvases.reduce((sum, canvas) => sum + first_row(canvas).filter(is_drawn).length, 0);
}"""
# The mean difference, in levels of 255, between a photograph and the columns of an image that show it.
DIFFERENCE = """async ([photograph, image, direction]) => {
    const read = async (base64) => createImageBitmap(new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))]));
    const pixels = (bitmap, x, width, scaled) => {
        const canvas = new OffscreenCanvas(width, 256);
        const context = canvas.getContext("2d");
        context.drawImage(bitmap, x, 0, scaled, 256);
        return context.getImageData(0, 0, width, 256).data;
    };
    const [given, made] = [await read(photograph), await read(image)];
    const scaled = Math.round(given.width * 256 / given.height);
    const width = scaled - scaled % 16;
    const expected = pixels(given, direction === "right" ? width - scaled : 0, width, scaled);
    const found = pixels(made, direction === "right" ? 0 : width - made.width, width, made.width);
    return expected.reduce((sum, value, index) => sum + Math.abs(value - found[index]), 0) / expected.length;
}"""
# Whether the service has a number of images that have not ended.
PENDING = "async (count) => new RegExp(`^eqim_pending_images.* ${count}$`, 'm').test(await (await fetch('metrics')).text())"
# The largest distance that the picture can be scrolled.
END = "document.getElementById('landscape').scrollWidth - document.getElementById('landscape').clientWidth"
DROP = """([base64, name]) => {
    const files = new DataTransfer();
    files.items.add(new File([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], name, { type: "image/jpeg" }));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser):
    """Opens pages. A test fails if one of them had an error, or asked another server."""
    contexts, problems = [], []

    def opened(url, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url) if is_foreign(request.url, url) else None)
        page.goto(url)
        return page

    opened.problems = problems
    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def is_foreign(address, url):
    origin = "/".join(url.split("/")[:3])
    return not address.startswith((f"{origin}/", f"blob:{origin}/", "data:"))


def link(service, **settings):
    fields = {"prompt": "forest", **settings}
    return f"{service.url}/#" + "&".join(f"{name}={value}" for name, value in fields.items())


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def fill(page, settings):
    labels = {"seed": "Seed", "guidance": "Guidance", "steps": "Steps", "tokens": "Tokens"}
    # The controls are set when the models are known.
    expect(button(page, "Start")).to_be_enabled()
    for name, value in settings.items():
        page.get_by_role("spinbutton", name=labels[name], exact=True).fill(str(value))


def is_complete(page):
    expect(page.get_by_role("status")).to_contain_text("Complete", timeout=PATIENCE)


def strips_arrive(page):
    """Waits until there are more tokens than now."""
    counts = page.locator("#counts")
    expect(counts).not_to_have_text(counts.inner_text(), timeout=PATIENCE)


def landscape(page):
    return page.get_by_role("region", name="Landscape")


def saved(page):
    with page.expect_download() as download:
        button(page, "Save as PNG").click()
    assert download.value.suggested_filename.endswith(".png")
    return Path(download.value.path()).read_bytes()


def width(png):
    assert png.startswith(b"\x89PNG")
    return int.from_bytes(png[16:20], "big")


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"page-{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_image_grows_and_completes(service, new_page, scheme):
    page = new_page(service.url, color_scheme=scheme, viewport={"width": 1280, "height": 800})
    expect(page.get_by_text("Choose a class and press Start")).to_be_visible()
    shot(page, f"{scheme}-start")
    fill(page, LONG)
    button(page, "Start").click()
    strips_arrive(page)
    drawn = page.evaluate(DRAWN)
    assert 0 < drawn < WIDTH
    strips_arrive(page)
    assert drawn < page.evaluate(DRAWN) < WIDTH
    expect(button(page, "Stop")).to_be_visible()
    shot(page, f"{scheme}-running")
    is_complete(page)
    expect(button(page, "Start")).to_be_visible()
    assert page.evaluate(DRAWN) == WIDTH
    expect(page.get_by_text("128 of 128 tokens")).to_be_visible()
    # The view has followed the newest columns.
    expect(landscape(page)).to_have_js_property("scrollLeft", page.evaluate(END))
    shot(page, f"{scheme}-complete")


def test_a_narrow_window_has_room_for_everything(service, new_page):
    page = new_page(link(service, **SHORT), viewport={"width": 320, "height": 640})
    is_complete(page)
    page.evaluate(DROP, [base64.b64encode(PHOTOGRAPH.read_bytes()).decode(), "a long name of a photograph.jpg"])
    expect(button(page, "Remove photograph")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "page-narrow.png", full_page=True)


def test_a_link_makes_the_image_whose_class_was_changed(service, new_page):
    page = new_page(service.url)
    fill(page, LONG)
    button(page, "forest").click()
    expect(button(page, "forest")).to_have_attribute("aria-pressed", "true")
    button(page, "Start").click()
    expect(page).to_have_url(re.compile(r"#prompt=forest&seed=3&guidance=3&steps=50&tokens=128&model="))
    strips_arrive(page)
    button(page, "water").click()
    expect(page.get_by_text(re.compile(r"^Classes: forest 0–\d+, water from token \d+ on$"))).to_be_visible()
    expect(page).to_have_url(re.compile(r"#prompt=forest:0-(\d+),water:\1-&seed=3&"))
    is_complete(page)
    first = saved(page)
    assert width(first) == WIDTH
    copy = new_page(page.url)
    is_complete(copy)
    expect(button(copy, "water")).to_have_attribute("aria-pressed", "true")
    assert saved(copy) == first


def test_the_link_can_be_copied(service, new_page):
    page = new_page(link(service, **SHORT), permissions=["clipboard-read", "clipboard-write"])
    is_complete(page)
    button(page, "Copy link").click()
    expect(page.get_by_role("status")).to_have_text("The link is copied.")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_photograph_is_carried_on(service, new_page, direction):
    page = new_page(service.url)
    fill(page, {**SHORT, "tokens": 40})
    photograph = base64.b64encode(PHOTOGRAPH.read_bytes()).decode()
    page.evaluate(DROP, [photograph, PHOTOGRAPH.name])
    page.get_by_label(f"To the {direction}").check()
    button(page, "Start").click()
    is_complete(page)
    shot(page, f"photograph-{direction}")
    image = saved(page)
    # 683 × 512 pixels are 342 × 256: 21 whole tokens.
    assert width(image) == (21 + 40) * 16
    image = base64.b64encode(image).decode()
    to_right, to_left = (page.evaluate(DIFFERENCE, [photograph, image, side]) for side in ["right", "left"])
    # Its pixels are kept, except for those near the edge.
    same, other = (to_right, to_left) if direction == "right" else (to_left, to_right)
    assert same < 5 < other
    assert "#" not in page.url
    expect(button(page, "Copy link")).to_be_disabled()
    button(page, "Remove photograph").click()
    expect(button(page, "Remove photograph")).to_be_hidden()


def test_stop_cancels_the_image_and_keeps_its_columns(service, new_page):
    page = new_page(link(service, **{**LONG, "tokens": 1000}))
    strips_arrive(page)
    # The policy of the page does not allow Playwright to wait for a function there.
    metrics = page.context.new_page()
    metrics.goto(f"{service.url}/metrics")
    metrics.wait_for_function(PENDING, arg=1)
    button(page, "Stop").click()
    expect(page.get_by_role("status")).to_contain_text("Stopped after")
    tokens = int(re.search(r"\d+", page.get_by_role("status").inner_text()).group())
    assert 0 < tokens < 1000
    metrics.wait_for_function(PENDING, arg=0)
    assert width(saved(page)) == tokens * 16


def test_the_keyboard_is_enough(service, new_page):
    page = new_page(service.url, reduced_motion="reduce", viewport={"width": 640, "height": 720})
    fill(page, SHORT)
    page.evaluate("document.activeElement.blur()")
    focus(page, "landscape")
    focus(page, "run")
    page.keyboard.press("Enter")
    is_complete(page)
    page.keyboard.press("Shift+Tab")
    end = page.evaluate(END)
    assert end > 0
    expect(landscape(page)).to_have_js_property("scrollLeft", end)
    page.keyboard.press("Home")
    expect(landscape(page)).to_have_js_property("scrollLeft", 0)
    page.keyboard.press("End")
    expect(landscape(page)).to_have_js_property("scrollLeft", end)
    page.keyboard.press("ArrowLeft")
    expect(landscape(page)).not_to_have_js_property("scrollLeft", end)
    focus(page, "water", "textContent")
    page.keyboard.press("Space")
    expect(button(page, "water")).to_have_attribute("aria-pressed", "true")


def focus(page, wanted, attribute="id"):
    """Presses Tab until the element with this attribute is focused."""
    for _ in range(30):
        if page.evaluate(f"document.activeElement.{attribute}") == wanted:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {wanted}")


def test_all_controls_have_names(service, new_page):
    page = new_page(service.url)
    page.evaluate(DROP, [base64.b64encode(PHOTOGRAPH.read_bytes()).decode(), PHOTOGRAPH.name])
    expect(button(page, "Remove photograph")).to_be_visible()
    for role in ["button", "spinbutton", "combobox", "textbox", "searchbox", "checkbox", "radio", "progressbar", "region"]:
        controls = page.get_by_role(role)
        named = page.get_by_role(role, name=re.compile(r"\w"))
        assert named.count() == controls.count(), role
    assert page.get_by_role("spinbutton").count() == 4
    expect(page.get_by_role("region", name="Landscape")).to_be_visible()


def test_an_error_is_shown_in_words(service, new_page):
    page = new_page(link(service, prompt="jungle"))
    expect(page.get_by_role("alert")).to_contain_text("jungle")
    expect(button(page, "Start")).to_be_visible()
    # The browser reports the status of the response, too.
    assert all("400" in problem for problem in new_page.problems)
    new_page.problems.clear()


def test_a_service_with_a_key_asks_for_it(service_with_key, new_page):
    page = new_page(service_with_key.url)
    key = page.get_by_label("Key of this service")
    expect(page.get_by_role("alert")).to_contain_text("key")
    key.fill("another key")
    with page.expect_response(lambda response: response.status == 401):
        key.press("Enter")
    expect(key).to_be_visible()
    key.fill(service_with_key.key)
    key.press("Enter")
    expect(key).to_be_hidden()
    fill(page, SHORT)
    button(page, "Start").click()
    is_complete(page)
    assert all("401" in problem for problem in new_page.problems)
    new_page.problems.clear()
