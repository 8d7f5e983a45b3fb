"""The evaluation page in headless Chromium, at desktop and phone width."""

import shutil

import pytest

pytestmark = pytest.mark.end_to_end

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

LOSSES = "Loss (nats per token), by length in tokens"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(f"no {'browser (chromium, chromium-browser, google-chrome)' if driver else 'chromedriver'} found")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture(params=[(1400, "light"), (1400, "dark"), (360, "light")], ids=lambda param: f"{param[0]}-{param[1]}")
def opened(request, browser, folder):
    """Browser with the opened page, and its width."""
    width, scheme = request.param
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")  # clear the log of earlier tests
    browser.get(folder.joinpath("index.html").as_uri())
    assert browser.execute_script("return window.innerWidth") == width
    return browser, width


def test_page_shows_everything_without_network_requests(opened, results):
    browser, width = opened
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.compatMode") == "CSS1Compat"
    images = browser.execute_script("return [...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(images) == 9
    assert all(complete and pixels > 0 for complete, pixels in images)
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requests if not name.startswith(("data:", "file:"))] == []
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) == 0

    assert browser.find_element("css selector", "h1").text == "Evaluation of RoPE, RoPE++ EH and RoPE++ EC"
    headings = [heading.get_attribute("id") for heading in browser.find_elements("css selector", "h2")]
    assert headings == ["findings", "models", "perplexity", "retrieval", "noise", "attention", "harness", "method",
                        "repeat", "limits"]  # fmt: skip
    scores = "Score (0 to 100), all families, by length in tokens"
    for title in ("Models", LOSSES, scores, "Tasks of lm-eval"):
        box = browser.find_element("css selector", f"[aria-label='{title}']")
        assert box.is_displayed()
        assert 0 < box.rect["width"] <= width  # wider tables scroll
        assert all(model["name"] in box.text for model in results["models"])


def test_wide_tables_scroll_with_a_sticky_first_column(opened):
    browser, width = opened
    box = browser.find_element("css selector", f"[aria-label='{LOSSES}']")
    scrolls = browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)
    assert scrolls == (width == 360)
    browser.execute_script("arguments[0].scrollLeft = 10000", box)
    name = box.find_element("css selector", "tbody th")
    left = browser.execute_script("return arguments[0].getBoundingClientRect().left", name)
    assert left - box.rect["x"] <= 1  # width of the border
    last = box.find_elements("css selector", "tbody tr")[0].find_elements("css selector", "td")[-1]
    right = browser.execute_script("return arguments[0].getBoundingClientRect().right", last)
    assert right <= box.rect["x"] + box.rect["width"]


def test_collapsed_tables_open_on_click(opened):
    browser, _ = opened
    box = browser.find_element("css selector", "[aria-label='Perplexity, by length in tokens']")
    assert not box.is_displayed()
    browser.find_element("css selector", "#perplexity ~ details summary").click()
    assert box.is_displayed()


def test_text_has_sufficient_contrast(opened):
    """Texts in tables have a contrast of at least 4.5 to 1 (WCAG), in light and dark mode."""
    browser, _ = opened
    selectors = [
        ".value", ".interval", ".difference", ".better", ".worse", "thead th", "summary", "figcaption p",
        ".example q", ".example .faint", ".example .better", ".example .worse",
    ]  # fmt: skip
    script = """
      return arguments[0].map(selector => {
        let element = document.querySelector(selector), background = element;
        while (getComputedStyle(background).backgroundColor === 'rgba(0, 0, 0, 0)')
          background = background.parentElement;
        return [getComputedStyle(element).color, getComputedStyle(background).backgroundColor];
      });
    """
    for selector, colours in zip(selectors, browser.execute_script(script, selectors), strict=True):
        lighter, darker = sorted(map(luminance, colours), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (selector, colours)


def luminance(colour):
    """Return the relative luminance of `rgb(1, 2, 3)` as defined by WCAG."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
