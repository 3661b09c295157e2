"""A headless Chromium for tests of pages; they are skipped where there is none."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def started(folder: Path) -> Iterator[Any]:
    """A browser with its profile in a folder, which quits at the end; what it logs is kept."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


# The contrast of each visible text to what is painted behind it, with what it is, lowest first.
CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const painted = (colors) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = rgb => {
  const [r, g, b] = rgb.map(c => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!hasText || !element.checkVisibility() || element.closest(":disabled, .hidden, .skip, option")) continue;
  const under = [];
  for (let each = element; each; each = each.parentElement) under.unshift(getComputedStyle(each).backgroundColor);
  const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
  const pair = [painted(under), painted([...under, ink])].map(light).sort((a, b) => b - a);
  const what = `${element.tagName} ${element.getAttribute("class")} ${element.textContent.slice(0, 20)}`;
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), what]);
}
return found.sort((a, b) => a[0] - b[0]);
"""
