"""The page, in gradio. Needs the extra ``playground``.

Events take raw values (``preprocess=False``): what someone has uploaded or typed is checked by
``request``, whose messages say what is wrong. gradio still refuses files that were not uploaded.

gradio's queue lets one request draw at a time. It cannot end a function that is running, nor all
that one tab has in the queue; so each request carries the time at which it was sent, and ends by
itself before its next step if its tab has cancelled since.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from customized_grpo.errors import ConfigError, CustomizedGRPOError
from customized_grpo.files import read_variable
from customized_grpo.pictures import to_pil
from customized_grpo.rewards.endpoints.http_client import PROXY_VARIABLES, open_client
from customized_grpo.tools.generate import prompt_remarks
from customized_grpo.tools.playground import markup
from customized_grpo.tools.playground.request import (
    MOST_LETTERS,
    MOST_STRENGTH,
    Comparison,
    DrawRequest,
    TrainedWeights,
    describe_picture,
    read_request,
)
from customized_grpo.tools.playground.session import Session

logger = logging.getLogger("customized_grpo")

Changes = dict[Any, Any]
"""Component -> its new value or fields."""

_CSS = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
_EXAMPLES, _MOST_JOBS = 4, 16
_CRISP_BELOW = 256  # px: smaller pictures are enlarged with hard edges
_MOST_BYTES = "64mb"
_TUNNEL = "https://api.gradio.app"
# In place of the last input; of one clock, the tab's, so that it can be compared.
_NOW = "(...values) => [...values.slice(0, -1), Date.now()]"
_PROGRESS = gr.Progress()  # by this default gradio knows where to put one that belongs to the event


class Cancelled(Exception):
    """The request was called off."""


@contextmanager
def serving(session: Session, port: int | None = None, share: bool = False) -> Iterator[str]:
    """The page is at the address inside. Uploads and pictures go where gradio's
    ``GRADIO_TEMP_DIR`` says.

    Raises:
        ConfigError: if the port is taken.
    """
    page = Page(session)
    try:
        with own_server_asked_directly(share):
            address = _launch(page.blocks, port, share)
        yield address
    finally:
        page.close()


@contextmanager
def own_server_asked_directly(share: bool) -> Iterator[None]:
    """Gradio asks its own server whether it is there, which no proxy of the environment knows.

    Raises:
        ConfigError: for a ``share``, if a proxy cannot be used.
    """
    if share:
        open_client([_TUNNEL]).close()
    saved = {name: os.environ.pop(name, None) for name in (*PROXY_VARIABLES, "no_proxy")}
    if share:
        os.environ |= {name: value for name, value in saved.items() if value is not None}
        beyond = saved["no_proxy"] or read_variable("NO_PROXY")
        os.environ["no_proxy"] = f"{beyond},127.0.0.1"
    try:
        yield
    finally:
        os.environ.pop("no_proxy", None)
        os.environ |= {name: value for name, value in saved.items() if value is not None}


def _launch(page: gr.Blocks, port: int | None, share: bool) -> str:
    try:
        page.queue(max_size=_MOST_JOBS, default_concurrency_limit=None)
        _, local, public = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size=_MOST_BYTES,
            theme=_theme(),
            css=_CSS,
            # The page of a share is loaded from gradio's servers.
            app_kwargs=None if share else {"middleware": [Middleware(NothingFromOutside)]},
        )
    except OSError as error:
        raise ConfigError(f"--port must be free, got {port} ({error}); leave it out") from error
    return public or local


def _theme() -> gr.themes.Base:
    """Fonts of the system, which come from nowhere, and greys that can be read."""
    theme = gr.themes.Base(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


class NothingFromOutside:
    """Tells the browser to load nothing from other hosts, whatever the page asks for."""

    _POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = self._POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)


class Page:
    """Components of the page and what they do."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._cancelled_at: dict[str, float] = {}  # tab -> by its own clock, in ms
        self._closing = threading.Event()
        trained = session.trained()
        name = session.config.name
        with gr.Blocks(
            title=f"{name} - playground", fill_width=True, analytics_enabled=False
        ) as self.blocks:
            gr.HTML(markup.heading(session))
            with gr.Row():
                with gr.Column(min_width=300, scale=2):
                    self._add_inputs(trained)
                with gr.Column(min_width=300, scale=3):
                    self._add_outputs(bool(trained))
            if examples := session.examples(_EXAMPLES):
                rows = [[to_pil(example.references[0]), example.prompt] for example in examples]
                gr.Examples(rows, [self._picture, self._prompt], label="Held-out examples")
            self._connect()

    def _add_inputs(self, trained: Sequence[TrainedWeights]) -> None:
        session = self._session
        self._picture = gr.Image(
            label="Reference picture",
            type="filepath",
            format="png",
            sources=["upload", "clipboard"],
            height=220,
            elem_id="reference",
        )
        self._prompt = gr.Textbox(
            label="Prompt",
            placeholder="an animal on the beach",
            max_lines=1,
            max_length=MOST_LETTERS,
            elem_id="prompt",
        )
        self._subject = gr.Textbox(
            label="Subject",
            info="what the reference shows, in a word: a reward looks for it",
            max_lines=1,
            visible=session.wants_subject,
            elem_id="subject",
        )
        self._seed = gr.Number(
            label="Seed", info="of the noise that both start from", value=0, elem_id="seed"
        )
        self._strength = gr.Slider(
            0,
            MOST_STRENGTH,
            value=1,
            step=0.05,
            label="LoRA strength",
            info="0 is the base, 1 as it was trained",
            visible=session.is_lora,
            buttons=[],
            elem_id="strength",
        )
        self._trained = gr.State(tuple(trained))
        self._place = gr.Slider(**_places(trained), step=1, buttons=[], elem_id="place")
        self._label = gr.HTML(_label(trained, len(trained)))
        with gr.Row():
            self._generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="go")
            self._cancel = gr.Button("Cancel", min_width=120, elem_id="cancel")

    def _add_outputs(self, has_tuned: bool) -> None:
        self._status = gr.HTML(markup.note("Upload a picture and type a prompt."), elem_id="status")
        with gr.Row(elem_classes="pair"):
            self._base, self._tuned = (
                gr.Image(
                    label=name,
                    format="png",
                    interactive=False,
                    min_width=130,
                    buttons=["download", "fullscreen"],
                    visible=name == "base" or has_tuned,
                    elem_id=name,
                )
                for name in ("base", "tuned")
            )
        self._answer = gr.HTML(elem_id="answer")

    def _connect(self) -> None:
        sent_at = gr.Number(visible=False)
        asked = [self._picture, self._prompt, self._subject, self._seed, self._strength]
        asked += [self._place, self._trained, sent_at]
        shown = [self._status, self._base, self._tuned, self._answer]
        raw: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}
        hidden: dict[str, Any] = raw | {"show_progress": "hidden"}
        stopping: dict[str, Any] = hidden | {"queue": False, "js": _NOW}
        drawing: dict[str, Any] = raw | {
            "js": _NOW,
            "show_progress_on": self._status,
            "concurrency_id": "generator",
            "concurrency_limit": 1,
        }
        submits = [field.submit for field in (self._prompt, self._subject, self._seed)]
        triggers = [self._generate.click, *submits]
        gr.on(triggers, self._draw, asked, shown, trigger_mode="multiple", **drawing)
        turned = [self._place, self._trained, sent_at]
        turn = self._place.change(self._turn, turned, self._label, **stopping)
        turn.then(self._browse, asked, shown, **drawing)
        self._cancel.click(self._stop, sent_at, self._status, **stopping)
        self._picture.change(self._look, self._picture, self._status, **hidden)
        self.blocks.load(self._refresh, None, [self._trained, self._place, self._label], **hidden)
        self.blocks.unload(self._leave)

    def close(self) -> None:
        """Ends what is drawn before its next step, and what waits, and the page."""
        self._closing.set()
        self.blocks.close(verbose=False)

    def _draw(self, request: gr.Request, progress: gr.Progress = _PROGRESS, *asked: Any) -> Changes:
        """Draws what is asked for, or says what is wrong with it."""
        tab, sent_at = request.session_hash or "", asked[-1]

        def on_progress(stage: str, done: int, total: int) -> None:
            if self._closing.is_set() or sent_at < self._cancelled_at.get(tab, -math.inf):
                raise Cancelled
            progress((done, total), stage)

        try:
            compared = self._session.draw(_read(*asked[:-1]), on_progress)
        except Cancelled:
            return {self._status: markup.note("Cancelled.")}
        except (CustomizedGRPOError, OSError) as error:
            return {self._status: markup.error(str(error))}
        except Exception as error:
            logger.exception("a request of the playground has failed")
            text = f"{type(error).__name__}: see the terminal. The page goes on working."
            return {self._status: markup.error(text)}
        remarks = prompt_remarks(self._session.config, [compared.request.example.prompt])
        said = markup.note(f"{'; '.join(['Done', *remarks])}.")
        return {self._status: said} | self._show(compared)

    def _browse(
        self, request: gr.Request, progress: gr.Progress = _PROGRESS, *asked: Any
    ) -> Changes:
        """Draws by other weights what is asked for; nothing, where it is not filled in yet."""
        picture, prompt, *_ = asked
        ready = picture and (prompt or "").strip()
        return self._draw(request, progress, *asked) if ready else gr.skip()

    def _show(self, compared: Comparison) -> Changes:
        prompt = compared.request.example.prompt
        changes: Changes = {self._answer: markup.answer(compared, self._session.objectives)}
        for name, component in (("base", self._base), ("tuned", self._tuned)):
            drawn = getattr(compared, name)
            if drawn is not None:
                crisp = ["crisp"] if max(drawn.image.size) < _CRISP_BELOW else []
                changes[component] = gr.Image(
                    drawn.image, alt_text=f"{name}: {prompt}", elem_classes=crisp
                )
        return changes

    def _look(self, picture: dict[str, Any] | None) -> str:
        """Says at once what is wrong with an upload, or what will be made of it."""
        if picture is None:
            return markup.note("Upload a picture and type a prompt.")
        try:
            return markup.note(describe_picture(Path(picture["path"])))
        except CustomizedGRPOError as error:
            return markup.error(str(error))

    def _stop(self, request: gr.Request, now: float) -> str:
        """Calls off what the tab has in the queue."""
        self._cancelled_at[request.session_hash or ""] = now
        return markup.note("Cancelled.")

    def _turn(
        self, request: gr.Request, place: float, trained: Sequence[TrainedWeights], now: float
    ) -> str:
        """Names the chosen weights; what they draw takes the place of what was asked for before."""
        self._stop(request, now)
        return _label(trained, place)

    def _leave(self, request: gr.Request) -> None:
        self._stop(request, math.inf)

    def _refresh(self) -> Changes:
        """The checkpoints that there are now."""
        trained = self._session.trained()
        return {
            self._trained: trained,
            self._place: gr.Slider(**_places(trained)),
            self._label: _label(trained, len(trained)),
        }


def _read(picture: Any, prompt: Any, subject: Any, *numbers: Any) -> DrawRequest:
    seed, strength, place, trained = numbers
    path = Path(picture["path"]) if picture else None
    chosen = trained[int(place) - 1] if trained else None
    return read_request(path, prompt or "", seed, chosen, strength, subject or "")


def _places(trained: Sequence[TrainedWeights]) -> dict[str, Any]:
    """Fields of the slider along training."""
    count = len(trained)
    return {
        "minimum": 1,
        "maximum": max(count, 2),
        "value": max(count, 1),
        "label": "Checkpoint",
        "info": f"1: {trained[0].label}; {count}: {trained[-1].label}" if trained else "",
        "visible": count > 1,
    }


def _label(trained: Sequence[TrainedWeights], place: float) -> str:
    return markup.note(f"Tuned: {trained[int(place) - 1].label}") if trained else ""
