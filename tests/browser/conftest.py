"""A headless Chromium (from the system, with its own driver) that keeps its console and its requests."""

import json
import shutil

import pytest

from tests.report.samples import sample_report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """A window on one report."""

    def __init__(self, driver, root):
        self.driver = driver
        self.root = root

    def open(self, name: str, width: int = 1280, dark: bool = False):
        """Open a page at a width; what the console and the network said before is forgotten."""
        self.driver.get("about:blank")
        self.console(), self.requests()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        page, _, place = name.partition("#")
        self.driver.get((self.root / page).as_uri() + (f"#{place}" if place else ""))
        return self

    def console(self) -> list[str]:
        """Return what the page has written to the console, errors of loading and of security policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"]

    def run(self, script: str, *values):
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(script, *values)

    def until(self, script: str, timeout_s: float = 15.0):
        """Wait until an expression is true; returns it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, timeout_s).until(lambda _: self.run(f"return {script}"))

    def text(self, selector: str) -> str:
        """Return the text of the first element."""
        return self.run("return document.querySelector(arguments[0]).textContent", selector)


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """A report of every stage, made of text that tries to break out of it."""
    return sample_report(tmp_path_factory.getbasetemp() / "sample_report")


@pytest.fixture(scope="session")
def browser(report, tmp_path_factory):
    """Chromium, opened on the report's folder."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield Browser(driver, report.path)
    driver.quit()
