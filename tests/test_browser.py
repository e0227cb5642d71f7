"""The page's experiment as the page tells it: ten tabs on /docs, in a real browser.

The browser reaches nothing but the server under test, so that /docs works only if the application
serves all of it. Set SCREENSHOTS to a folder to have the pictures of docs/experiment.md taken anew.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from experiment.measuring import create_user, fire
from experiment.serving import serve, temporary_database

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TABS = 10
# The other visitors: today's FastAPI seldom fails on ten tabs alone (docs/experiment.md says why).
OTHERS = 100
STEP = 0.2

OPERATION = "#operations-default-read_slow_users_slowusers__get"
# A message reaches all tabs at once, sooner than anybody could click.
CLICK_WHEN_TOLD = f"""
    new BroadcastChannel("experiment").onmessage =
        () => document.querySelector("{OPERATION} .execute").click()
"""
TELL = 'new BroadcastChannel("experiment").postMessage("now")'


def program(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no {names[0]} here (Debian's packages: chromium, chromium-driver)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=640,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService(program("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Tabs:
    """Ten tabs on a server's /docs, with /slowusers/ open and *Try it out* clicked."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.url = url
        self._browser = browser
        self._handles: list[str] = []
        for _ in range(TABS):
            browser.switch_to.new_window("tab")
            self._handles.append(browser.current_window_handle)
            browser.get(f"{url}/docs#/default/read_slow_users_slowusers__get")
            self._try_it_out()
            browser.execute_script(CLICK_WHEN_TOLD)
            # Else Chromium holds back a request while the same one is under way. It is "Disable
            # cache" in the developer tools.
            browser.execute_cdp_cmd("Network.enable", {})
            browser.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})

    def execute(self) -> list[str]:
        """*Execute* in every tab, all at once: the answers, as each tab shows them."""
        self._browser.execute_script(TELL)
        return [self._wait_for(".live-responses-table .response").text for _ in self._each()]

    def clear(self) -> None:
        """Take away the answers of the last time."""
        for _ in self._each():
            for button in self._browser.find_elements(By.CSS_SELECTOR, f"{OPERATION} .btn-clear"):
                button.click()

    def picture(self, path: Path) -> None:
        """What each tab shows as its server response, in two columns."""
        tiles = []
        for _ in self._each():
            response = self._wait_for(".live-responses-table")
            self._browser.execute_script("arguments[0].scrollIntoView()", response)
            tiles.append(Image.open(BytesIO(response.screenshot_as_png)).convert("RGB"))
        width, height, label, gap = tiles[0].width, 205, 24, 16
        sheet = Image.new(
            "RGB", (2 * width + gap, TABS // 2 * (height + label + gap) - gap), "white"
        )
        draw = ImageDraw.Draw(sheet)
        for number, tile in enumerate(tiles):
            left, top = number % 2 * (width + gap), number // 2 * (height + label + gap)
            draw.text((left, top), f"Tab {number + 1}", "black", font_size=17)
            sheet.paste(tile.crop((0, 0, width, height)), (left, top + label))
        sheet.quantize(64).save(path, optimize=True)

    def close(self) -> None:
        for _ in self._each():
            self._browser.close()
        self._browser.switch_to.window(self._browser.window_handles[0])

    def _each(self) -> Iterator[None]:
        for handle in self._handles:
            self._browser.switch_to.window(handle)
            yield

    def _try_it_out(self) -> None:
        """Click *Try it out* until the page takes it: while it draws itself, clicks get lost."""

        def tried(browser: webdriver.Chrome) -> bool:
            if browser.find_elements(By.CSS_SELECTOR, f"{OPERATION} .execute"):
                return True
            browser.execute_script(
                f"document.querySelector('{OPERATION} .try-out__btn:not(.cancel)')?.click()"
            )
            return False

        WebDriverWait(self._browser, 60).until(tried, "Try it out does nothing")

    def _wait_for(self, part: str) -> WebElement:
        found = WebDriverWait(self._browser, 60).until(
            lambda browser: browser.find_elements(By.CSS_SELECTOR, f"{OPERATION} {part}"),
            f"{self._browser.current_url} shows no {part}",
        )
        return found[0]


@contextmanager
def ten_tabs(browser: webdriver.Chrome, application: str) -> Iterator[Tabs]:
    with (
        temporary_database(None) as database,
        serve(application, {"DATABASE_URL": database.url, "SLOWUSERS_STEP": str(STEP)}) as server,
    ):
        create_user(server)
        tabs = Tabs(browser, server.url)
        try:
            yield tabs
        finally:
            tabs.close()


def take_picture(tabs: Tabs, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        tabs.picture(Path(folder, name))


def codes(answers: list[str]) -> list[str]:
    return [answer.split()[0] for answer in answers]


def test_ten_tabs_show_200(browser: webdriver.Chrome) -> None:
    """Ten tabs execute /slowusers/ of sql_app at once, alone and among others: all show 200."""
    with ten_tabs(browser, "sql_app.main:app") as tabs:
        answers = tabs.execute()
        assert codes(answers) == ["200"] * TABS
        assert all("reader@example.com" in answer for answer in answers)
        assert codes(execute_among_others(tabs)) == ["200"] * TABS
        take_picture(tabs, "tabs-protected.png")


def test_without_protections_tabs_show_internal_server_error(browser: webdriver.Chrome) -> None:
    """With the protections off some tabs show Internal Server Error."""
    with ten_tabs(browser, "experiment.unprotected:app") as tabs:
        for _ in range(5):  # the first round does it, nearly always
            answers = execute_among_others(tabs)
            assert set(codes(answers)) <= {"200", "500"}
            failed = [answer for answer in answers if answer.startswith("500")]
            if failed:
                break
        assert failed
        assert all("Internal Server Error" in answer for answer in failed)
        take_picture(tabs, "tabs-unprotected.png")


def execute_among_others(tabs: Tabs) -> list[str]:
    tabs.clear()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(asyncio.run, fire(tabs.url, OTHERS))
        time.sleep(0.1)  # let them arrive
        answers = tabs.execute()
        others.result()
    return answers
