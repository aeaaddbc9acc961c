"""Test the page of items and codes in a browser: headless Chromium opens the file and uses it."""

from __future__ import annotations

import shutil

import pytest

from adasid.report import explore
from tests.unit.test_explore import HOSTILE, made

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium or chromedriver is not installed")
SIZES = {"phone": (360, 740), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("explore") / "index.html"
    path.write_text(explore.render(made()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser, file):
    """The browser with the page open; it must log no errors."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(file)
    yield browser
    assert browser.get_log("browser") == []


def size(browser, name):
    width, height = SIZES[name]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": name == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def after(browser, act):
    """Do what goes to another view, and wait until it is shown."""
    listener = "addEventListener('hashchange', () => setTimeout(done), {once: true})"
    browser.execute_script(f"window.shown = new Promise(done => {listener})")
    act()
    browser.execute_async_script("window.shown.then(arguments[0])")


def go(browser, fragment):
    if browser.execute_script("return location.hash") != fragment:
        after(browser, lambda: browser.execute_script("location.hash = arguments[0]", fragment))


def one(browser, selector):
    return browser.find_element("css selector", selector)


def texts(browser, selector):
    return [element.text for element in browser.find_elements("css selector", selector)]


def title(browser):
    return one(browser, "main h2").text


def typed(browser, text):
    box = one(browser, "#query")
    box.clear()
    box.send_keys(text)
    return texts(browser, "main ol a"), one(browser, "[role=status]").text


def test_search_finds_titles_and_ids_without_accents_or_case(page):
    assert len(texts(page, "main ol a")) == 20
    names, said = typed(page, "CAFE")
    assert names[0] == "café table 0" and len(names) == 15 and said == "15 items."
    assert typed(page, "table 12")[0] == ["café table 12"]
    assert typed(page, "shoes 1")[0][:2] == ["red shoes 1", "red shoes 13"]  # whole words first
    assert typed(page, "i59")[0] == ["green tea 59"]
    assert typed(page, "decor")[0] == [" ".join(HOSTILE.split())]
    assert typed(page, "nothing here") == ([], "No item has all these words. The page has 60 of 60 items.")
    typed(page, "t0.3")
    assert texts(page, "main p a") == ["Code t0.3"]


def test_the_keyboard_goes_from_the_search_to_an_item_and_back(page):
    from selenium.webdriver.common.keys import Keys

    typed(page, "red")
    box = one(page, "#query")
    box.send_keys(Keys.ARROW_DOWN)
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert page.switch_to.active_element.text == "red shoes 5"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.switch_to.active_element.get_attribute("id") == "query"
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    after(page, lambda: page.switch_to.active_element.send_keys(Keys.ENTER))
    assert title(page) == "red shoes 1" and page.switch_to.active_element.tag_name == "h2"
    after(page, page.back)
    assert one(page, "#query").get_attribute("value") == "red" and len(texts(page, "main ol a")) == 15
    page.execute_script("document.querySelector('.skip').focus()")
    assert one(page, ".skip").rect["x"] == 0
    one(page, ".skip").send_keys(Keys.ENTER)
    assert page.switch_to.active_element.tag_name == "main"


def test_an_item_leads_to_its_codes_and_the_browser_goes_back(page):
    typed(page, "tea 3")
    after(page, one(page, "main ol a").click)
    assert title(page) == "green tea 3" and page.title.startswith("green tea 3")
    assert texts(page, ".chip")[0] == "s0 3\nshared" and texts(page, ".chip.off") == ["b0 7\nswitched off"]
    assert "Switched off for this item, so that no weight is on it: b0." in one(page, "main").text
    picture = one(page, "img.picture")
    assert picture.get_attribute("alt") == "Picture of green tea 3" and picture.get_property("naturalWidth") == 96
    near = texts(page, "section[aria-label='Neighbours by text'] li a")
    assert len(near) == 10 and all(name.startswith("green tea") for name in near)
    after(page, one(page, ".chip").click)
    assert title(page) == "Code s0.3"
    words, strata, following = page.find_elements("css selector", "main table")
    assert words.text.splitlines()[2].split()[0] in ("green", "tea")
    assert "Head 3 20.0\u202f% 25.0\u202f%" in strata.text
    assert following.find_element("css selector", "a").text == "s0.0"
    assert texts(page, "main > div > ol a")[:2] == ["green tea 3", "green tea 7"]
    after(page, page.back)
    assert title(page) == "green tea 3"
    after(page, page.back)
    assert title(page) == "Search"


def test_items_and_codes_that_are_not_on_the_page_say_so(page):
    for fragment, words in {
        "#item=%3Cb%3E": "The item <b> is not on this page.",
        "#code=s0.99": "There is no code s0.99.",
        "#item=%": "The item % is not on this page.",
    }.items():
        go(page, fragment)
        assert words in one(page, "main").text
    go(page, "#item=i5")
    assert "no text vector" in texts(page, ".chip")[1]
    assert "The item has no text vector." in one(page, "section[aria-label='Neighbours by text']").text
    go(page, "#item=a%3D%26%23%3Cb%3E")
    assert title(page) == "café table 0"


def test_the_map_is_drawn_and_led_by_mouse_and_keys(page):
    from selenium.webdriver.common.keys import Keys

    size(page, "desktop")
    go(page, "#map")
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    drawn = (
        "const c = document.querySelector('canvas'), p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const found = new Set(); for (let at = 0; at < p.length; at += 4) if (p[at + 3])"
        "found.add(p[at] << 16 | p[at + 1] << 8 | p[at + 2]); return found.size"
    )
    assert page.execute_script(drawn) >= 4
    canvas = one(page, "canvas")
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert "café table 0" in one(page, ".card").text
    canvas.send_keys(Keys.ARROW_LEFT)
    moved = one(page, ".card a").text
    webdriver.ActionChains(page).move_to_element(canvas).perform()
    pointed = one(page, ".card a").text
    assert len({moved, pointed}) == 2
    assert texts(page, ".codes a")[0] == "s0.0"
    one(page, "#colour option[value='-1']").click()
    assert texts(page, ".codes li") == [f"{name}: 15 items" for name in ("Head", "Mid", "Tail", "Cold")]
    after(page, webdriver.ActionChains(page).move_to_element(canvas).click().perform)
    assert title(page) == pointed


def test_changes_are_shown_beside_each_other(page):
    go(page, "#changes")
    assert "changed the SIDs of 701 items" in one(page, "main").text
    first, second, third = page.find_elements("css selector", ".change")
    assert first.find_element("css selector", "a").text == "green tea 3"
    moved = [chip.get_property("textContent") for chip in first.find_elements("css selector", ".moved")]
    assert len(moved) == 2 and all(text.startswith("t0 ") and text.endswith("(differs)") for text in moved)
    assert "warm, 1 of 3 codes changed" in first.text
    assert "no SID" in second.text and "no SID" in third.text
    assert not second.find_elements("css selector", "a")


def test_a_hostile_title_is_only_text(page):
    for fragment in ("#search=img", "#item=i2", "#code=s0.2", "#changes", f"#item={HOSTILE.split()[0]}"):
        go(page, fragment)
        assert not page.find_elements("css selector", "img[src='x'], main script")
    go(page, "#item=i2")
    assert title(page) == " ".join(HOSTILE.split())
    assert "<img src=x" in one(page, "h1").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(page, scheme):
    size(page, "phone")
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    for fragment in ("#search=e", "#item=i2", "#item=i3", "#code=s0.3", "#map=i3", "#changes"):
        go(page, fragment)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360, fragment
    light = page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")


def test_a_page_without_changes_titles_or_histories_is_complete(browser, tmp_path):
    data = made()
    data["titles"] = [""] * 60
    data["changes"] = {"reasons": {}, "rows": []}
    for slot in data["slots"]:
        slot["words"], slot["next"] = {}, {}
    (tmp_path / "index.html").write_text(explore.render(data), encoding="utf-8")
    browser.get((tmp_path / "index.html").as_uri())
    go(browser, "#item=i3")
    assert title(browser) == "i3"
    go(browser, "#code=s0.3")
    said = one(browser, "main").text
    assert "No word is typical" in said and "No event of the histories" in said
    go(browser, "#changes")
    assert "No changes are recorded for generation 2" in one(browser, "main").text
    assert browser.get_log("browser") == []
