"""A real Chromium, driven through its own chromedriver, for the tests of the page, which are skipped where
there is none: Debian's packages chromium and chromium-driver, and the package selenium.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1380,860", "--accept-lang=en-US"),
)


class Browser:
    """`driver` of selenium, the folder of its downloads, and the few words that the tests say."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def all(self, selector: str) -> list[Any]:
        """The elements of a CSS selector that are seen."""
        found = self.driver.find_elements("css selector", selector)
        return [one for one in found if one.is_displayed()]

    def one(self, selector: str) -> Any:
        """The same of exactly one, which is waited for."""
        self.until(lambda: len(self.all(selector)) == 1, selector)
        return self.all(selector)[0]

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def chord(self, modifier: str, key: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def cdp(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)

    def until(self, holds: Callable[[], Any], what: str = "", most_s: float = 10.0) -> None:
        """Waits until something holds. An element that is drawn anew meanwhile is looked for again."""
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(int(most_s / 0.025)):
            try:
                if holds():
                    return
            except StaleElementReferenceException:
                pass
            time.sleep(0.025)
        raise AssertionError(f"{what or holds} did not come; the page says: {self.one('body').text!r}")

    def errors(self) -> list[str]:
        """What the console has said since the last call, refusals of the server left out: the browser itself
        writes a line for each."""
        lines = [entry["message"] for entry in self.driver.get_log("browser")]
        return [line for line in lines if "the server responded with a status of" not in line]


@contextmanager
def chromium(profile: Path, downloads: Path) -> Iterator[Browser]:
    """One that keeps what it keeps in an empty folder `profile`. Skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(started, downloads)
    finally:
        started.quit()
