"""The page in a real browser, before the real interface and a small real model."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_selenium_python import Axe
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

SECONDS = 60
KEY = "a-key-of-the-tests"
SMALL, LARGE = (360, 740), (1280, 900)
REFUSED = re.compile(
    r"Failed to load resource: the server responded with a status of (400|401|429)"
)

# Keeps what the stage said of steps, and the width of the picture that it showed then.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const words = document.querySelector("#stage .facts")?.textContent ?? "";
  if (words.startsWith("Step") && window.seen.at(-1) !== words) window.seen.push(words);
}).observe(document.getElementById("stage"), {subtree: true, childList: true, characterData: true});
"""

TOO_SMALL = """
const seen = [...document.querySelectorAll("a, button, input, select, summary, textarea")].filter(
  (one) => one.checkVisibility() && one.getBoundingClientRect().right > 0 && !one.matches(".skip"));
return seen.filter((one) => {
  const box = one.getBoundingClientRect();
  return box.height < 44 && !one.closest("p");
}).map((one) => one.outerHTML.slice(0, 80));
"""


class Page:
    """What a person does with the page."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads
        where = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)

    def open(self, url: str, hash: str = "") -> None:
        """A page nobody has been on."""
        self.driver.get("about:blank")
        origin = {"origin": url, "storageTypes": "all"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", origin)
        self.driver.get(f"{url}/{hash}")
        self.until(lambda: self.find("#form").is_displayed() or self.find("#locked").is_displayed())
        self.driver.execute_script(WATCH)

    def reload(self) -> None:
        self.driver.refresh()
        self.until(lambda: self.find("#form").is_displayed())

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, SECONDS, 0.05, ()).until(lambda _: condition())

    def fill(self, selector: str, value: object) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(str(value))

    def unfold(self, selector: str) -> None:
        if not self.find(selector).get_attribute("open"):
            self.find(f"{selector} > summary").click()

    def draw(self, prompt: str, size: int = 32, steps: int = 8, **fields: object) -> None:
        """Draws, and waits for the picture."""
        self.unfold("#settings")
        self.fill("#prompt", prompt)
        self.find(f"#size-{size}").click()
        for name, value in {"steps": steps, **fields}.items():
            self.fill(f"#{name}", value)
        self.find("#draw").click()
        self.done()

    def done(self) -> None:
        """Nothing is being drawn any more."""
        self.until(lambda: not self.find("#stop").is_displayed())

    def act(self, name: str, place: str = "#stage") -> None:
        self.find(f"{place} .{name}").click()

    def picture(self, place: str = "#stage") -> Image.Image:
        """The picture, downloaded."""
        for file in self.downloads.iterdir():
            file.unlink()
        self.act("download", place)
        self.until(
            lambda: [file.suffix for file in self.downloads.iterdir()] not in ([], [".crdownload"])
        )
        (file,) = self.downloads.iterdir()
        return Image.open(io.BytesIO(file.read_bytes()))

    @property
    def cards(self) -> list[WebElement]:
        return self.all("#pictures > li")

    @property
    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": name},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def violations(self) -> list[str]:
        """What axe finds wrong in light surroundings and in dark ones."""
        axe, found = Axe(self.driver), []
        for scheme in ("light", "dark"):
            self.scheme(scheme)
            axe.inject()
            for one in axe.run()["violations"]:
                found += [
                    f"{scheme} {one['id']}: {node['target']} {node['html'][:120]}"
                    for node in one["nodes"]
                ]
        return found

    def hosts(self) -> set[str]:
        """Who has been asked for anything since this was last asked."""
        events = [
            json.loads(line["message"])["message"] for line in self.driver.get_log("performance")
        ]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}

    def complaints(self) -> list[str]:
        """Warnings and errors of the browser, but for answers that the page tells in its own words."""
        lines = [line for line in self.driver.get_log("browser") if line["level"] != "DEBUG"]
        return [line["message"] for line in lines if not REFUSED.search(line["message"])]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    chrome.set_script_timeout(SECONDS)
    yield chrome
    chrome.quit()


@pytest.fixture
def page(driver, tmp_path) -> Iterator[Page]:
    """The page, which must not complain and must ask nobody but its server."""
    (tmp_path / "downloads").mkdir()
    one = Page(driver, tmp_path / "downloads")
    one.size(*LARGE)
    one.scheme("light")
    one.complaints()
    one.hosts()
    yield one
    assert one.complaints() == []
    assert one.hosts() == {"127.0.0.1"}


def test_a_prompt_becomes_a_picture_layer_by_layer(page, server):
    page.open(server.url)
    page.unfold("#settings")
    page.fill("#steps", 20)
    page.find("#prompt").send_keys("a red apple", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.cards)
    page.done()

    seen = page.driver.execute_script("return window.seen")
    told = [re.fullmatch(r"Step (\d+) of 20, (\d+) pixels", words) for words in seen]
    steps, layers = zip(*[(int(one[1]), int(one[2])) for one in told], strict=True)
    assert list(steps) == sorted(steps)
    assert sorted(set(layers)) == [8, 16, 32]
    assert list(layers) == sorted(layers)
    picture = page.find("#stage .tile img")
    assert picture.get_attribute("alt") == "a red apple"
    assert picture.get_property("naturalWidth") == 32
    assert "is drawn" in page.find("#live").text

    text = page.picture().text
    assert (text["prompt"], text["num_steps"], text["size"]) == ("a red apple", "20", "32x32")
    assert f"seed {text['seed']}" in page.find("#stage .facts").text
    (file,) = page.downloads.iterdir()
    assert file.name == f"a-red-apple-{text['seed']}-32.png"


def test_several_pictures_have_seeds_that_follow_each_other(page, server):
    page.open(server.url)
    page.draw("two dogs", size=8, seed=str(2**62), count=3)
    seeds = sorted(re.search(r"seed (\d+)", card.text)[1] for card in page.cards)
    assert seeds == [str(2**62 + i) for i in range(3)]
    assert len(page.all("#stage .tile img")) == 3
    page.find("#fix-seed").click()
    assert page.find("#seed").get_property("value") == ""
    page.find("#fix-seed").click()
    assert page.find("#seed").get_property("value") in seeds


def test_a_picture_is_enlarged_with_its_seed(page, server):
    page.open(server.url)
    page.draw("a red apple", size=8, seed=5)
    for size in (16, 32):
        page.act("larger")
        page.done()
        text = page.picture().text
        assert (text["size"], text["seed"], text["strength"]) == (f"{size}x{size}", "5", "1.0")
        assert "finish_sha256" in text
    assert not page.find("#stage .larger").is_enabled()
    assert len(page.cards) == 3


def test_a_picture_is_varied_with_another_seed(page, server):
    page.open(server.url)
    page.draw("a red apple", seed=5, guidance=3)
    page.act("vary", "#pictures li")
    page.until(lambda: len(page.cards) == 2)
    page.done()
    text = page.picture().text
    assert text["seed"] != "5"
    assert (text["prompt"], text["guidance"]) == ("a red apple", "3.0")
    assert (text["strength"], "image_sha256" in text) == ("0.6", True)
    assert page.find("#seed").get_property("value") == "5"


def test_the_gallery_outlives_a_reload_until_it_is_emptied(page, server):
    page.open(server.url)
    for seed in (1, 2, 3):
        page.draw("a cat", size=8, seed=seed)
    file = page.picture().tobytes()
    page.reload()
    page.until(lambda: len(page.cards) == 3)
    assert page.picture().tobytes() == file

    page.act("delete", "#pictures li:nth-child(2)")
    page.until(lambda: len(page.cards) == 2)
    assert [re.search(r"seed (\d)", card.text)[1] for card in page.cards] == ["3", "1"]
    page.find("#undo button").click()
    page.until(lambda: len(page.cards) == 3)
    page.act("delete", "#stage")
    page.until(lambda: len(page.cards) == 2)
    page.reload()
    page.until(lambda: len(page.cards) == 2)
    page.find("#clear").click()
    page.until(lambda: not page.cards)
    assert page.all("#stage .empty")
    page.reload()
    assert not page.cards


def test_settings_are_taken_up_again(page, server):
    page.open(server.url)
    page.unfold("#more")
    page.fill("#layer-16-prompt", "a cat")
    page.fill("#layer-32-guidance", 4)
    page.draw("a red apple", size=16, steps=6, seed=9, negative="dogs")
    page.fill("#prompt", "something else")
    page.fill("#steps", 3)
    page.fill("#layer-16-prompt", "no cat")
    page.act("use")
    assert page.focused.get_attribute("id") == "prompt"
    values = {
        name: page.find(f"#{name}").get_property("value")
        for name in ("prompt", "negative", "steps", "seed", "layer-16-prompt")
    }
    assert values == {
        "prompt": "a red apple",
        "negative": "dogs",
        "steps": "6",
        "seed": "9",
        "layer-16-prompt": "a cat",
    }
    text = page.picture().text
    assert json.loads(text["layer_prompts"]) == {"16": "a cat"}
    assert text["negative_prompt"] == "dogs"


def test_a_layer_has_guidance_of_its_own(page, server):
    page.open(server.url)
    page.unfold("#more")
    page.fill("#layer-16-guidance", 4.5)
    page.draw("a red apple", guidance=1.5)
    assert json.loads(page.picture().text["guidance"]) == [1.5, 4.5, 1.5]


def test_a_picture_of_ones_own_is_the_start(page, server, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    page.open(server.url)
    page.unfold("#more")
    page.find("#start").send_keys(str(tmp_path / "red.png"))
    page.until(lambda: page.find("#start-picture").is_displayed())
    page.find("#strength").send_keys(Keys.ARROW_LEFT)
    page.draw("a red apple")
    text = page.picture().text
    assert (text["strength"], "image_sha256" in text) == ("0.55", True)
    page.find("#start-remove").click()
    page.draw("a red apple")
    assert "strength" not in page.picture().text


def test_other_formats_are_kept_as_they_come(page, server):
    page.open(server.url)
    page.unfold("#more")
    page.find("#format option[value=webp]").click()
    page.fill("#quality", 50)
    page.draw("a cat", size=16)
    assert page.picture().format == "WEBP"


def test_the_address_holds_the_settings(page, server):
    address = "#prompt=a+cat&size=16&seed=9223372036854775807&steps=5&guidance=1.5&prompt-16=red"
    page.open(server.url, address)
    values = [
        page.find(selector).get_property("value")
        for selector in ("#prompt", "#seed", "#steps", "#guidance", "#layer-16-prompt")
    ]
    assert values == ["a cat", "9223372036854775807", "5", "1.5", "red"]
    assert page.find("#size-16").is_selected()
    page.fill("#prompt", "a dog & more")
    page.until(lambda: "prompt=a+dog+%26+more" in page.driver.current_url)
    page.find("#draw").click()
    page.until(lambda: page.cards)
    assert page.picture().text["seed"] == "9223372036854775807"


def test_text_is_never_markup(page, server):
    page.open(server.url)
    prompt = "<b>cat</b>"
    page.draw(prompt, size=8)
    assert page.find("#pictures .prompt").text == prompt
    page.find("#pictures .tile").click()
    assert page.find("#viewer h2").text == prompt
    assert not page.all("b")


@pytest.mark.parametrize("end", [Keys.ESCAPE, "#stop"])
def test_stopping_frees_the_place(page, server, end):
    page.open(server.url)
    page.unfold("#settings")
    page.fill("#steps", 250)
    page.fill("#count", 4)
    page.find("#prompt").send_keys("a cat", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.find("#stop").is_displayed())
    if end == "#stop":
        page.find(end).click()
    else:
        page.press(end)
    page.done()
    page.until(lambda: not server.painter.load().active)
    assert "Stopped" in page.find("#live").text
    assert page.find("#draw").get_attribute("aria-disabled") == "false"


def test_all_of_it_works_by_keyboard(page, server):
    page.open(server.url)
    page.press(Keys.TAB)
    assert page.focused.get_attribute("class") == "skip"
    page.press(Keys.ENTER)
    assert page.focused.get_attribute("id") == "prompt"
    page.press("a cat", Keys.TAB)
    assert page.focused.get_attribute("id") == "draw"
    page.press(Keys.ENTER)
    page.until(lambda: page.cards)
    page.done()
    assert page.focused.get_attribute("id") == "draw"

    visited = []
    while "tile" not in (page.focused.get_attribute("class") or ""):
        page.press(Keys.TAB)
        visited.append(page.focused.get_attribute("id") or page.focused.tag_name)
    assert visited[:6] == ["summary", "negative", "size-32", "steps", "guidance", "count"]
    page.press(Keys.ENTER)
    assert page.find("#viewer").get_attribute("open")
    assert page.focused.get_attribute("id") == "viewer-title"
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.find("#viewer").get_attribute("open"))
    assert "tile" in page.focused.get_attribute("class")

    page.press(Keys.TAB, Keys.ENTER)  # 32 pixels are the largest, so that the next is to vary
    page.until(lambda: len(page.cards) == 2)
    page.done()
    outlines = page.driver.execute_script(
        "document.getElementById('draw').focus();"
        "return getComputedStyle(document.activeElement).outlineStyle"
    )
    assert outlines == "solid"


def test_arrows_turn_the_pages_of_the_gallery(page, server):
    page.open(server.url)
    for seed in (1, 2):
        page.draw("a cat", size=8, seed=seed)
    page.find("#pictures .tile").click()
    assert "2" in page.find("#viewer dl").text
    page.press(Keys.ARROW_RIGHT)
    assert page.find("#viewer [aria-label=Newer]").is_enabled()
    assert not page.find("#viewer [aria-label=Older]").is_enabled()
    page.act("larger", "#viewer")
    page.until(lambda: len(page.cards) == 3)
    page.done()
    assert not page.find("#viewer").get_attribute("open")
    assert page.picture().text["seed"] == "1"


def test_a_phone_needs_no_scrolling_sideways(page, server):
    page.open(server.url)
    page.draw("a cat", size=16)
    page.size(*SMALL)
    page.unfold("#more")

    def fits() -> None:
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 360
        assert page.driver.execute_script(TOO_SMALL) == []

    fits()
    page.find("#pictures .tile").click()
    fits()
    page.driver.get(f"{server.url}/docs")
    page.until(lambda: page.all("#operations section"))
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize(
    ("selector", "value", "message"),
    [
        ("#prompt", "cat " * 99, "The prompt has 100 tokens; the model reads at most 16."),
        ("#layer-32-prompt", "cat " * 20, "The prompt of the layer of 32 pixels has 21 tokens"),
        ("#steps", 999, "Steps: a whole number from 1 to 250."),
        ("#steps", "", "Steps: a whole number from 1 to 250."),
        ("#count", 0, "Pictures: a whole number from 1 to 10."),
        ("#seed", "-1", "The seed is a whole number"),
        ("#seed", str(2**63), "The seed is a whole number"),
    ],
)
def test_a_mistake_is_shown_at_its_field(page, server, selector, value, message):
    page.open(server.url)
    page.unfold("#more")
    page.fill(selector, value)
    page.find("#more > summary").click()
    page.find("#draw").click()
    page.until(lambda: page.find("#form-notice").is_displayed())
    assert message in page.find("#form-notice").text
    field = page.find(selector)
    assert page.focused == field
    assert field.get_attribute("aria-invalid") == "true"
    described = page.find(f"#{field.get_attribute('aria-describedby')}")
    assert message in described.text
    field.send_keys("1")
    assert field.get_attribute("aria-invalid") is None


def test_who_is_refused_is_told_when_to_come_again(page, serve_app):
    with serve_app(requests_per_minute=1) as server:
        page.open(server.url)
        page.draw("a cat", size=8)
        page.draw("a cat", size=8)
        notice = page.find("#form-notice")
        assert "1 requests a minute" in notice.text
        button = notice.find_element(By.TAG_NAME, "button")
        assert re.fullmatch(r"Try again in \d+ s", button.text)
        assert not button.is_enabled()
        assert len(page.cards) == 1
        assert page.violations() == []


def test_an_error_ends_a_stream(page, serve_app):
    with serve_app(max_seconds=0.2) as server:
        page.open(server.url)
        page.draw("a cat", steps=250)
        assert "deadline" in page.find("#form-notice").text
        page.fill("#steps", 1)
        page.find("#form-notice button").click()
        page.until(lambda: "deadline" in page.find("#form-notice").text)
        assert not page.cards


def test_a_server_that_is_gone_is_missed(page, serve_app):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve_app())
        page.open(server.url)
        stack.close()
        page.draw("a cat")
        assert page.find("#form-notice").text.startswith("The server cannot be reached.")
        assert page.find("#form-notice button").is_enabled()
    assert all("ERR_CONNECTION_REFUSED" in line for line in page.complaints())


def test_a_key_opens_the_page(page, serve_app, monkeypatch):
    monkeypatch.setenv("LAYERED_API_KEYS", f"tests: {KEY}")
    with serve_app(require_key=True) as server:
        page.open(server.url, "#prompt=a+cat")
        assert not page.find("#form").is_displayed()
        assert page.focused.get_attribute("type") == "password"
        assert page.violations() == []
        page.find("#key").send_keys("not the key", Keys.ENTER)
        page.until(lambda: "not known" in page.find("#key-notice").text)
        page.find("#key").send_keys(KEY, Keys.ENTER)
        page.until(lambda: page.find("#form").is_displayed())
        page.find("#draw").click()
        page.until(lambda: page.cards)
        page.reload()
        kept = page.driver.execute_script(
            "return [Object.values(sessionStorage), localStorage.length]"
        )
        assert kept == [[KEY], 0]
        assert KEY not in page.driver.current_url


def test_nobody_is_kept_out(page, server):
    """No violations of axe's rules, in light and dark."""
    page.open(server.url)
    assert page.violations() == []
    page.unfold("#settings")
    page.unfold("#more")
    page.draw("a cat", size=16, count=2)
    page.draw("a cat", size=16, count=1)
    page.act("delete", "#pictures li")
    assert page.violations() == []
    page.size(*SMALL)
    assert page.violations() == []
    page.find("#pictures .tile").click()
    assert page.violations() == []
    page.find("#viewer [aria-label=Close]").click()
    page.fill("#steps", 250)
    page.fill("#count", 4)
    page.find("#draw").click()
    page.until(lambda: page.all("#stage progress"))
    assert page.violations() == []
    page.press(Keys.ESCAPE)


def test_the_interface_is_described(page, server):
    page.driver.get(f"{server.url}/docs")
    page.until(lambda: page.all("#operations section"))
    text = page.find("main").text
    assert f"curl {server.url}/v1/images/upscales" in text
    assert "-F image=@picture.png" in text
    assert re.search(r"num_steps\s+whole number, at least 1", text)
    assert re.search(r"prompt\s+text, required", text)
    assert re.search(r"seed\s+whole number, at least 0, below 2\^63", text)
    assert "8x8, 16x16, 32x32" in text
    assert page.violations() == []
    page.size(*SMALL)
    assert page.violations() == []


def test_every_file_of_the_page_is_asked_for() -> None:
    """What index.html and docs.html need is there, and nothing else is."""
    folder = Path(__file__).parents[3] / "pipelines" / "serving" / "page"
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    wanted = {"index.html", "docs.html"}
    for text in texts.values():
        wanted |= set(re.findall(r'(?:src|href|src:)[= ]"page/([\w.]+)"', text))
        wanted |= set(re.findall(r'from "\./([\w.]+)"', text))
    assert wanted == set(texts)
