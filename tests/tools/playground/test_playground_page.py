"""The page in a real browser: headless Chromium, by mouse, by keyboard and at a phone's width."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run
from PIL import Image
from playground_tools import Gate, add_checkpoint, quick_config

from customized_grpo.cli.main import main
from customized_grpo.tools.playground.session import Session

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
FOX = "a golden fox on the beach"
SHOTS = os.environ.get("CGRPO_SHOTS")  # a folder for screenshots, to look at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures to upload, good and bad ones."""
    folder = tmp_path_factory.mktemp("uploads")
    small = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    good = Image.fromarray(small).resize((80, 64), Image.Resampling.NEAREST)
    good.save(folder / "good.png")
    good.resize((20, 20)).save(folder / "small.png")
    (folder / "truncated.png").write_bytes((folder / "good.png").read_bytes()[:150])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints before its end."""
    run = make_run(quick_config(tmp_path_factory.mktemp("runs")))
    spreads = {"reward/preference/std": 0.1, "reward/dinov2/std": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps({"update": 1} | spreads) + "\n")
    for update, factor in ((10, 0.4), (40, 1.6)):
        add_checkpoint(run, update, factor)
    return run


@pytest.fixture(scope="module", autouse=True)
def gradio_writes_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield


@pytest.fixture(scope="module")
def session(run: Path) -> Session:
    return Session(run)


@pytest.fixture(scope="module")
def address(session: Session) -> Iterator[str]:
    from customized_grpo.tools.playground.page import serving

    with serving(session) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )
        context.set_default_timeout(60_000)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page in a new tab; at the end it has complained of nothing and asked no other host."""
    page, asked, complaints = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    visit(page, address)
    yield page
    page.set_viewport_size({"width": 1280, "height": 900})
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert complaints == []


@pytest.fixture
def gate(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(session, monkeypatch)
    yield gate
    gate.open()


def visit(page: Any, address: str) -> None:
    """Opens the page and waits until it asks for the checkpoints: before, keys have no effect."""
    with page.expect_response("**/queue/join*"):
        page.goto(address)
    field(page, "prompt").wait_for()


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"playground-{name}.png", full_page=True)


def upload(page: Any, file: Path) -> None:
    page.locator("#reference input[type=file]").set_input_files(file)
    says(page, file.name)


def says(page: Any, text: str) -> None:
    """Waits until the page's status does."""
    page.locator("#status", has_text=text).wait_for()


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def ask(page: Any, folder: Path, prompt: str = FOX, seed: int = 3) -> None:
    upload(page, folder / "good.png")
    field(page, "seed").fill(str(seed))
    field(page, "prompt").fill(prompt)
    field(page, "prompt").press("Enter")


def shown(page: Any, name: str) -> np.ndarray:
    """Pixels of the picture behind the one on the page."""
    source = page.locator(f"#{name} img").get_attribute("src")
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))


def fits(page: Any) -> bool:
    """Whether nothing reaches beyond the screen, where it would be cut off or scrolled to."""
    return page.evaluate(
        """() => document.documentElement.scrollWidth <= window.innerWidth
            && ![...document.querySelectorAll('#status, #answer')].some(
                e => e.scrollWidth > e.clientWidth)"""
    )


def test_base_and_tuned_are_those_of_generate(
    page: Any, folder: Path, run: Path, tmp_path: Path
) -> None:
    shoot(page, "desktop-before")
    ask(page, folder)
    says(page, "Done")
    shoot(page, "desktop-after")
    words = ["--prompt", FOX, "--reference", str(folder / "good.png"), "--seeds", "3"]
    assert main(["generate", str(run), *words, "--out", str(tmp_path / "out")]) == 0
    for name in ("base", "tuned"):
        (expected,) = (tmp_path / "out").glob(f"*-{name}.png")
        np.testing.assert_array_equal(shown(page, name), np.asarray(Image.open(expected)))
        assert page.locator(f"#{name} img").get_attribute("alt") == f"{name}: {FOX}"
    answer = page.locator("#answer")
    assert "seed 3, weights at the end of training, strength 1" in answer.inner_text()
    assert answer.locator("td").count() == 6
    assert answer.locator("h3").inner_text() in ("Synergy", "Copy", "Forgets", "Worse")


def test_the_slider_draws_by_checkpoints(page: Any, folder: Path) -> None:
    ask(page, folder)
    says(page, "Done")
    answer, pictures = page.locator("#answer"), [shown(page, "tuned")]
    base = shown(page, "base")
    page.get_by_text("1: after update 10; 3: at the end of training").wait_for()
    handle = page.locator("#place input[type=range]")
    for label in ("after update 40", "after update 10"):
        handle.press("ArrowLeft")
        answer.locator("p", has_text=label).wait_for()
        page.get_by_text(f"Tuned: {label}").wait_for()
        pictures.append(shown(page, "tuned"))
        np.testing.assert_array_equal(shown(page, "base"), base)
    end, late, early = (np.abs(p.astype(int) - base.astype(int)).mean() for p in pictures)
    assert early < end < late  # as their LoRAs are: 0.4, 1 and 1.6 times as large


def test_the_slider_takes_the_place_of_what_is_drawn(page: Any, folder: Path, gate: Gate) -> None:
    ask(page, folder, seed=401)
    gate.go_to(1)
    says(page, "base: denoising")
    page.locator("#place input[type=range]").press("ArrowLeft")
    page.get_by_text("Tuned: after update 40").wait_for()
    gate.open()
    page.locator("#answer p", has_text="after update 40").wait_for()
    assert gate.steps == 1 + 4


def test_requests_queue_across_tabs_and_show_how_far_they_are(
    page: Any, browser: Any, address: str, folder: Path, gate: Gate
) -> None:
    ask(page, folder, "a cup", seed=101)
    gate.go_to(2)
    says(page, "base: denoising")
    says(page, "1/2 steps")
    shoot(page, "desktop-queue")
    field(page, "prompt").fill("a hat")
    page.get_by_role("button", name="Generate").click()
    tab = browser.new_page()
    visit(tab, address)
    ask(tab, folder, "a cap", seed=102)
    says(tab, "queue: 2/2")
    gate.open()
    says(tab, "Done")
    assert "a hat" in page.locator("#answer").inner_text()
    assert "a cap" in tab.locator("#answer").inner_text()
    tab.close()
    assert gate.steps == 3 * 4


def test_cancel_ends_them_and_no_other(
    page: Any, browser: Any, address: str, folder: Path, gate: Gate
) -> None:
    ask(page, folder, seed=201)
    gate.go_to(1)
    ask(page, folder, seed=202)
    tab = browser.new_page()
    visit(tab, address)
    ask(tab, folder, seed=203)
    says(tab, "queue: 2/2")
    page.get_by_role("button", name="Cancel").click()
    says(page, "Cancelled")
    gate.open()
    says(tab, "Done")
    tab.close()
    assert gate.steps == 1 + 4
    assert page.locator("#base img").count() == 0
    ask(page, folder, seed=204)
    says(page, "Done")


def test_closing_the_tab_cancels(
    page: Any, browser: Any, address: str, folder: Path, gate: Gate
) -> None:
    tab = browser.new_page()
    visit(tab, address)
    ask(tab, folder, seed=301)
    gate.go_to(1)
    tab.close(run_before_unload=True)
    page.wait_for_timeout(3000)
    gate.open()
    ask(page, folder, seed=302)
    says(page, "Done")
    assert gate.steps == 1 + 4


def test_a_bad_upload_gets_a_message_and_the_next_works(page: Any, folder: Path) -> None:
    expected = "truncated.png is not a readable picture"
    upload(page, folder / "truncated.png")
    says(page, expected)
    field(page, "prompt").fill(FOX)
    field(page, "prompt").press("Enter")
    page.locator("#status [role=alert]", has_text=expected).wait_for()
    shoot(page, "desktop-error")
    assert page.locator("#base img").count() == 0
    ask(page, folder)
    says(page, "Done")


def test_an_example_fills_the_form(page: Any) -> None:
    page.locator("table tbody tr").first.click()
    says(page, "64 x 64 px")
    prompt = field(page, "prompt").input_value()
    page.get_by_role("button", name="Generate").click()
    says(page, "Done")
    assert prompt in page.locator("#answer").inner_text()


def test_by_keyboard_alone(page: Any, folder: Path) -> None:
    order = ["reference", "prompt", "seed", "strength", "place", "go", "cancel"]
    here = "names => names.find(name => document.activeElement.closest('#' + name))"
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.keyboard.press("Tab")
    for _ in range(20):  # playwright may listen a little later than it says
        page.keyboard.press("Enter")
        page.wait_for_timeout(200)
        if choosers:
            break
    choosers[0].set_files(folder / "good.png")
    says(page, "80 x 64 px")
    reached = ["reference"]
    while reached[-1] != "cancel" and len(reached) < 30:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(here, order))
        if reached[-1] == "prompt":
            page.keyboard.type(FOX)
        if reached[-1] == "go":
            page.keyboard.press("Enter")
            says(page, "Done")
    assert [name for name in dict.fromkeys(reached) if name] == order


def test_every_field_has_a_label(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, button, progress')]
            .filter(e => e.offsetParent !== null && e.type !== 'file')
            .filter(e => !(e.labels && e.labels.length) && !e.getAttribute('aria-label')
                && !e.getAttribute('aria-labelledby') && !e.innerText.trim() && !e.title)
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []


def test_a_phone_shows_all_of_it(page: Any, folder: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page, page.url)
    assert fits(page)
    shoot(page, "phone-before")
    ask(page, folder, FOX + ", " + "w" * 300)  # one word longer than the screen
    says(page, "Done")
    assert fits(page)
    shoot(page, "phone-after")
    base, tuned = (page.locator(f"#{name} img").bounding_box() for name in ("base", "tuned"))
    assert base["y"] == tuned["y"]  # side by side here too
    assert base["x"] < tuned["x"]
    assert min(base["width"], tuned["width"]) >= 120
    upload(page, folder / "small.png")
    says(page, "at least 32 px")
    assert fits(page)
    shoot(page, "phone-error")


def test_the_end_of_the_page_ends_what_is_drawn(
    browser: Any, folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from customized_grpo.tools.playground.page import serving

    session = Session(run)
    gate = Gate(session, monkeypatch)
    with serving(session) as address:
        tab = browser.new_page()
        visit(tab, address)
        ask(tab, folder, seed=501)
        gate.go_to(1)
        threading.Timer(1, gate.open).start()
    tab.wait_for_timeout(3000)
    tab.close()
    assert gate.steps == 1
