"""Pages in headless Chromium: what a script finds in them, the console, screenshots.

A window of Chromium is at least 500 pixels wide, so a page is looked at in a frame: any number of
widths and colour schemes in one start, which takes seconds.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
WORDS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--window-size=1400,1000",
    "--enable-logging=stderr",
    "--v=0",
    # a frame's script is asked by the page around it, which is another file
    "--allow-file-access-from-files",
)
# in every frame, before the probe of a test
COMMON = """
const root = document.documentElement;
const named = (node) => node.getAttribute("alt") || node.getAttribute("aria-label") || "";
const links = [...document.querySelectorAll("[src], [href]")].map(
  (node) => node.getAttribute("src") || node.getAttribute("href"));
const common = {
  window: root.clientWidth,
  page: root.scrollWidth,
  ground: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  names: [...document.querySelectorAll("img, svg[role=img]")].map(named),
  unnamed: [...document.querySelectorAll("svg:not([role=img]):not([aria-hidden=true])")].length,
  broken: [...document.images].filter((image) => !image.naturalWidth).length,
  outside: links.filter((link) => !/^(data:|#)/.test(link)),
  ids: [...document.querySelectorAll("[id]")].map((node) => node.id),
};
"""
FRAMES = """<!doctype html><meta charset="utf-8"><title>-</title><body>
{frames}
<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map((frame) => frame.contentWindow.eval(
    "(() => {{" + document.querySelector("template").content.textContent + "}})()"));
  document.title = JSON.stringify(found);
}});
</script><template>{probe}</template></body>"""


@dataclass(frozen=True)
class Look:
    """found: of each frame, the common values and those of the probe; console: lines of it."""

    found: list[dict[str, Any]]
    console: list[str]


def look(page, frames, probe="return {};"):
    """Open `page` (a path) in `frames` of (width, scheme) and run `probe`, JavaScript that returns
    a mapping, in each of them."""
    text = COMMON + "return Object.assign(common, (() => {" + probe + "})());"
    around = page.with_name(f".{page.stem}-frames.html")
    shown = "".join(_frame(page, width, scheme) for width, scheme in frames)
    around.write_text(FRAMES.format(frames=shown, probe=html.escape(text)), encoding="utf-8")
    out = _chromium(around, "--dump-dom")
    title = re.search("<title>(.*?)</title>", out.stdout, re.DOTALL)[1]
    assert title != "-", out.stderr
    console = [line for line in out.stderr.splitlines() if ":CONSOLE" in line]
    return Look(json.loads(html.unescape(title)), console)


def screenshot(page, path, width, scheme="light", height=1000):
    """Write a PNG of the page's first `height` pixels."""
    around = page.with_name(f".{page.stem}-frames.html")
    text = "<!doctype html><body style='margin:0'>" + _frame(page, width, scheme, height)
    around.write_text(text, encoding="utf-8")
    _chromium(around, f"--screenshot={path}", f"--window-size={max(width, 500)},{height}")
    return path


def _frame(page, width, scheme, height=1000):
    style = f"border:0;display:block;width:{width}px;height:{height}px;color-scheme:{scheme}"
    return f'<iframe src="{page.name}" style="{style}"></iframe>'


def _chromium(page, *words):
    command = ["chromium", *WORDS, *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
