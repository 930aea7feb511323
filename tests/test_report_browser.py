"""report.html in headless Chromium: no error, light, dark and narrow, and what its script does."""

import json
import os
import shutil
import subprocess
import time

import pytest
from helpers import options, run_here

from infra.report import write_report
from infra.runlog import append_rows, read_rows

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def starts(program):
    """Whether the program starts: a half-installed one lacks a library."""
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Browser:
    """Headless Chromium, spoken to through two pipes."""

    def __init__(self, folder):
        (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()
        command = 'exec "$0" "$@" 3<&$IN 4>&$OUT'
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", command.replace("$IN", str(read_there)).replace("$OUT", str(write_there)), CHROMIUM, *flags],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self.input, self.output, self.count, self.session, self.events = (
            write_here,
            os.fdopen(read_here, "rb"),
            0,
            {},
            [],
        )
        [target] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer["method"])
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        text = bytearray()
        while (letter := self.output.read(1)) != b"\0":
            assert letter, "the browser has ended"
            text += letter
        return json.loads(text)

    def value(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_to(self, selector):
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        edge = f"(b => [b.x + b.width / 2, b.y + 3])(document.querySelector({selector!r}).getBoundingClientRect())"
        x, y = self.value(edge)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def open(self, path, width, theme):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Page.navigate", url=path.as_uri())
        for _ in range(100):
            if self.value("location.protocol == 'file:' && document.readyState") == "complete":
                return
            time.sleep(0.1)
        raise AssertionError(f"{path} does not load")

    def close(self):
        os.close(self.input)
        self.process.terminate()
        self.process.wait()
        self.output.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or not starts(CHROMIUM):
        pytest.skip("no Chromium that starts: apt-get install chromium, to test the page in a browser")
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


BOXES = ("<answer>[4, 4, 30, 30]</answer>", "<answer>[40, 40, 60, 60]</answer>", "none")
NASTY = "</script><script>alert(1)</script></style>\"'><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def page(checkpoint, scenes, tmp_path_factory):
    """The page of a finished run of the toy, whose two groups are given boxes: an untrained model writes none."""
    out = tmp_path_factory.mktemp("page") / "out"
    more = ["--steps", "24", "--eval_every", "12", "--save_every", "0", "--log_completions_every", "12"]
    run_here(options(checkpoint, scenes, out, *more))
    groups = read_rows(out / "completions.jsonl")
    for number, group in enumerate(groups):
        for row, text in zip(group["group"], BOXES, strict=True):
            row.update(completion=text, advantage=0.0, reward=float(number))
    groups[1].update(file="other", question=NASTY)
    (out / "completions.jsonl").unlink()
    append_rows(out / "completions.jsonl", groups)
    return write_report([out])


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_opens_in_a_browser_without_an_error(browser, page, width, theme):
    browser.events.clear()
    browser.open(page, width, theme)
    assert browser.value("document.documentElement.scrollWidth") <= width
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 23, 26)"}[theme]
    trouble = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening"}
    assert not trouble.intersection(browser.events)


def test_pointing_at_a_completion_lights_its_box_and_a_box_its_completion(browser, page):
    browser.open(page, 1280, "light")
    browser.move_to(".group li[data-k='1']")
    lit = "[...document.querySelectorAll('.lit')].map(e => e.tagName.toLowerCase() + e.dataset.k).sort().join()"
    assert browser.value(lit) == "g1,li1"
    browser.move_to("h1")
    assert browser.value(lit) == ""
    browser.move_to(".group g[data-k='0'] .over")
    assert browser.value(lit) == "g0,li0"


def test_filters_hide_groups_and_the_order_changes(browser, page):
    browser.open(page, 1280, "light")
    shown = "[...document.querySelectorAll('.group')].filter(g => g.offsetHeight).map(g => g.dataset.step).join()"
    choose = (
        "(e => {{ e.value = '{}'; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
        "(document.querySelector('{}'))"
    )
    assert browser.value(shown) == "12,24"
    browser.value(choose.format("newest", "[name=order]"))
    assert browser.value(shown) == "24,12"
    for value, name, expected in (
        ("other", "file", "24"),
        ("", "file", "24,12"),
        ("13", "step_from", "24"),
        ("9", "reward_from", ""),
    ):
        browser.value(choose.format(value, f"[name={name}]"))
        assert browser.value(shown) == expected


def test_each_of_two_runs_has_filters_of_its_own(browser, page, tmp_path):
    shutil.copytree(page.parent, tmp_path / "other")
    browser.open(write_report([tmp_path / "other", page.parent]), 1280, "light")
    shown = (
        "[...document.querySelectorAll('.groups')].map(g => [...g.children].filter(c => c.offsetHeight).length).join()"
    )
    assert browser.value(shown) == "2,2"
    browser.value(
        "(e => { e.value = 'other'; e.dispatchEvent(new Event('input', {bubbles: true})) })"
        "(document.querySelectorAll('.group-filters [name=file]')[1])"
    )
    assert browser.value(shown) == "2,1"


def test_a_curve_is_read_under_the_pointer_and_smoothing_can_be_turned_off(browser, page):
    browser.open(page, 1280, "light")
    browser.move_to(".chart svg")
    assert " to " in browser.value("document.querySelector('.chart .keys').textContent")  # the interval
    assert browser.value("document.querySelector('.chart small').textContent").startswith("step ")
    smooth = "getComputedStyle(document.querySelector('.smooth')).display"
    assert browser.value(smooth) != "none"
    browser.value("document.querySelector('#smooth').click()")
    assert browser.value(smooth) == "none"
