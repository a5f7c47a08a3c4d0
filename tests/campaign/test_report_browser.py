"""The report in a real browser, without a network: no script error, every figure drawn, rounds to choose from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from almlip_jax.campaign.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that is told that it is offline."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-unsafe-swiftshader",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1100,3200",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    found.set_network_conditions(offline=True, latency=0, throughput=0)
    yield found
    found.quit()


def test_the_report_opens_without_an_error(browser, reference: Path, tmp_path: Path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    shutil.copytree(reference / "run", tmp_path / "run")
    page = write_report(tmp_path / "run")
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(lambda d: d.find_elements(By.CSS_SELECTOR, "#walkers .main-svg"))
    for figure in ("learning_curve", "training", "walkers", "parity", "reliability"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#{figure} .main-svg"), figure
    structure = browser.find_element(By.ID, "structure")
    assert (
        structure.find_elements(By.TAG_NAME, "canvas")
        or "WebGL" in structure.text
        or "nothing to show" in structure.text
    )
    rounds = Select(browser.find_element(By.ID, "round"))
    assert len(rounds.options) >= 2
    before = browser.execute_script("return document.getElementById('walkers').data[0].y.join()")
    rounds.select_by_index(1)
    after = browser.execute_script("return document.getElementById('walkers').data[0].y.join()")
    assert before != after
    wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not wrong, wrong
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [name for name in asked if name.startswith("http")]
