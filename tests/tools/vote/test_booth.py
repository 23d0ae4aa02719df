"""`cgrpo vote`: what it serves and takes, over HTTP and in a real browser, as people use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn", reason="cgrpo vote needs the extra [playground]")

from helpers import error_line, tiny, wait_until
from torch import Tensor

from customized_grpo.cli.main import main
from customized_grpo.config import dump_config
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.ballots import VOTES, Ballots, Group
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.tools.vote.booth import Booth, serving

CHROMIUM = shutil.which("chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
SHOTS = os.environ.get("CGRPO_SHOTS")  # a folder for screenshots, to look at


def picture(shade: float, side: int = 64) -> Tensor:
    """A disc on a ground, in colours that tell pictures apart."""
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    disc = (rows**2 + columns**2 < 0.4).float()
    colour = torch.tensor([shade, 0.4, 1 - shade]).view(3, 1, 1)
    return disc * colour + (1 - disc) * 0.85


def ask(folder: Path, prompts: list[str], count: int = 4, **fields: Any) -> list[Group]:
    """What a run asks that waits."""
    ballots, settings = Ballots(folder), {"needs_worst": False, "min_votes": 1} | fields
    question = "Which picture shows best what the text says?"
    shades = [place / count for place in range(count)]
    groups = [
        ballots.group(
            question, prompt, [picture(0.5 + number / 10)],
            [picture(shade + number / 100) for shade in shades], **settings,
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    ballots.ask("votes-0", groups)
    return groups


def votes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / VOTES).read_text("utf-8").splitlines()]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with serving(Booth([tmp_path]), "my run") as address:
        yield address


def request(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and content of an answer; ``body`` is posted as JSON."""
    data = None if body is None else json.dumps(body).encode()
    headers = ({} if body is None else {"content-type": "application/json"}) | headers
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            content = answer.read()
            is_json = answer.headers["content-type"] == "application/json"
            return answer.status, json.loads(content) if is_json else content
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_serves_what_is_asked_and_takes_what_can_be_meant(tmp_path: Path, address: str) -> None:
    first, second = ask(tmp_path, ["a fox", "a cup"], needs_worst=True, min_votes=2)
    status, found = request(f"{address}groups?voter=ann")
    assert (status, [group["prompt"] for group in found["groups"]]) == (200, ["a fox", "a cup"])
    assert request(f"{address}pictures/{first.pictures[0]}.png")[1].startswith(b"\x89PNG")
    good = {"group": first.id, "best": first.pictures[1], "worst": first.pictures[0]}
    good |= {"voter": "ann"}
    for wrong, status, message in (
        ({"group": "0" * 32}, 409, "nobody waits"),
        ({"best": second.pictures[0]}, 400, "best must be one of the group"),
        ({"worst": None}, 400, "worst must be another of the group"),
        ({"best": None}, 400, "worst must be null"),
        ({"voter": ""}, 400, "voter"),
        ({"more": 1}, 400, "more must be a known field"),
    ):
        assert request(f"{address}votes", good | wrong)[0] == status
        assert message in request(f"{address}votes", good | wrong)[1]
    assert request(f"{address}votes", good, **{"content-type": "text/plain"})[0] == 415
    assert request(f"{address}groups", None, host="evil.example")[0] == 400
    assert request(f"{address}pictures/..%2Fvotes.png")[0] == 404
    assert not (tmp_path / VOTES).exists()
    assert request(f"{address}votes", good)[0] == 201
    assert request(f"{address}votes", {**good, "voter": "bob", "best": None, "worst": None})
    assert [vote["best"] for vote in votes(tmp_path)] == [first.pictures[1], None]
    _, left = request(f"{address}groups?voter=cem")
    assert ([g["prompt"] for g in left["groups"]], left["num_answered"]) == (["a cup"], 1)
    (tmp_path / VOTES).write_text("broken\n")
    assert "votes.jsonl:1: is not JSON" in request(f"{address}groups?voter=ann")[1]


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"--port must be free, got {port}"),
            serving(Booth([tmp_path]), "x", port),
        ):
            pass


def test_a_run_that_asks_nobody_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny(tmp_path)))
    (tmp_path / "environment.json").write_text("{}")
    line = error_line(capsys, "vote", tmp_path)
    assert "RUN must have a reward of type votes" in line
    assert "with preference, dinov2; only" in line


def test_the_command_serves_a_run_until_a_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path)
    models = [reward for reward in config.rewards if reward.objective == "identity"]
    config = replace(config, rewards=(VotesConfig(objective="prompt"), *models))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "environment.json").write_text("{}")
    ask(tmp_path / "votes", ["a fox"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found: list[Any] = []

    def visit() -> None:
        for _ in range(1000):
            with suppress(OSError):
                found.append(request(f"http://127.0.0.1:{port}/groups?voter=ann")[1])
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visit)
    thread.start()
    assert main(["vote", str(tmp_path), "--port", str(port)]) == 0
    thread.join()
    assert capsys.readouterr().out.startswith(f"vote: http://127.0.0.1:{port}/\n")
    assert (found[0]["title"], found[0]["num_asked"]) == (tmp_path.name, 1)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        context.set_default_timeout(60_000)
        yield context
        context.close()


def shoot(page: Any, name: str) -> None:
    if not SHOTS:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=Path(SHOTS) / f"vote-{name}-{scheme}.png")


def fits(page: Any) -> None:
    """Waits until all pictures are on the screen, large enough to be compared."""
    page.wait_for_function(
        """() => document.documentElement.scrollWidth <= window.innerWidth
            && [...document.images].every(image => image.complete && image.naturalWidth)
            && [...document.querySelectorAll('#pictures button')].every(
                b => b.getBoundingClientRect().bottom <= window.innerHeight
                    && b.getBoundingClientRect().width >= 110)"""
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_people_vote_in_a_browser(tmp_path: Path, address: str, browser: Any) -> None:
    page, asked, complaints = browser.new_page(), [], []
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(address)
    page.get_by_text("Nothing to vote on now").wait_for()
    groups = ask(tmp_path, ["a fox on the beach", "w" * 200, "a cup"], count=6)
    prompt, buttons = page.locator("#prompt"), page.locator("#pictures button")
    page.locator("#prompt", has_text="a fox").wait_for()  # seen without a reload
    fits(page)
    shoot(page, "desktop")
    buttons.nth(2).click()
    page.locator("#prompt", has_text="www").wait_for()
    page.set_viewport_size({"width": 390, "height": 844})
    fits(page)
    shoot(page, "phone")
    page.keyboard.press("5")
    page.locator("#prompt", has_text="a cup").wait_for()
    page.keyboard.press("0")
    page.get_by_text("Nothing to vote on now").wait_for()
    assert page.locator("#progress").inner_text() == "3 of 3 groups have their votes"
    cast = votes(tmp_path)
    assert [vote["best"] for vote in cast] == [groups[0].pictures[2], groups[1].pictures[4], None]
    assert {vote["voter"] for vote in cast} == {"me"}

    (group,) = ask(tmp_path, ["a hat"], count=2, needs_worst=True, min_votes=2)
    prompt.get_by_text("a hat").wait_for()
    page.keyboard.press("2")
    page.get_by_text("which one is the worst?").wait_for()
    shoot(page, "worst")
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    buttons.nth(0).click()
    page.get_by_text("Nothing to vote on now").wait_for()  # for this one
    page.locator("#voter").fill("bob")
    page.locator("#voter").press("Enter")
    buttons.first.wait_for()
    page.keyboard.press("Tab")
    page.locator("#alike").click()
    page.get_by_text("Nothing to vote on now").wait_for()
    wait_until(lambda: len(votes(tmp_path)) == 5)
    first, second = votes(tmp_path)[3:]
    assert (first["best"], first["worst"]) == (group.pictures[1], group.pictures[0])
    assert (second["voter"], second["best"]) == ("bob", None)
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert complaints == []
