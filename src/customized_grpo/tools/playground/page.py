"""The page, in gradio. Needs the extra ``playground``.

Events take raw values (``preprocess=False``): what someone has uploaded or typed is checked by
``request``, whose messages say what is wrong. gradio still refuses files that were not uploaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from customized_grpo.errors import ConfigError, CustomizedGRPOError
from customized_grpo.pictures import to_pil
from customized_grpo.tools.playground import markup
from customized_grpo.tools.playground.request import (
    MOST_LETTERS,
    MOST_STRENGTH,
    Outcome,
    Request,
    Trained,
    describe_picture,
    read_request,
)
from customized_grpo.tools.playground.session import Cancelled, Job, Session

logger = logging.getLogger("customized_grpo")

Changes = dict[Any, Any]
"""Component -> its new value or fields."""

_CSS = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
_POLL_SECONDS = 0.2
_EXAMPLES = 4
_CRISP_BELOW = 256  # px: smaller pictures are enlarged with hard edges
_MOST_BYTES = "64mb"


@contextmanager
def serving(session: Session, port: int | None = None, share: bool = False) -> Iterator[str]:
    """The page is at the address inside. Uploads and pictures are deleted afterwards.

    Raises:
        ConfigError: if the port is taken.
    """
    with TemporaryDirectory(prefix="cgrpo-playground-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = Page(session).blocks
        try:
            yield _launch(page, port, share)
        finally:
            session.close()
            page.close(verbose=False)


def _launch(page: gr.Blocks, port: int | None, share: bool) -> str:
    try:
        _, local, public = page.queue(default_concurrency_limit=None).launch(
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
            self._add_examples()
            self._connect()

    def _add_inputs(self, trained: Sequence[Trained]) -> None:
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
            placeholder="a golden fox on the beach",
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

    def _add_examples(self) -> None:
        examples = self._session.examples(_EXAMPLES)
        if examples:
            rows = [[to_pil(example.references[0]), example.prompt] for example in examples]
            gr.Examples(rows, [self._picture, self._prompt], label="Held-out examples")

    def _connect(self) -> None:
        asked = [self._picture, self._prompt, self._subject, self._seed, self._strength]
        asked += [self._place, self._trained]
        shown = [self._status, self._base, self._tuned, self._answer]
        raw: dict[str, Any] = {
            "preprocess": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        gr.on(
            [self._generate.click, self._prompt.submit, self._subject.submit, self._seed.submit],
            self._draw,
            asked,
            shown,
            trigger_mode="multiple",
            **raw,
        )
        self._place.change(self._browse, asked, shown, trigger_mode="multiple", **raw)
        self._place.change(_label, [self._trained, self._place], self._label, **raw)
        self._picture.change(self._look, self._picture, self._status, **raw)
        self._cancel.click(self._stop, None, self._status, **raw)
        self.blocks.load(self._refresh, None, [self._trained, self._place, self._label], **raw)
        self.blocks.unload(self._leave)

    def _draw(self, request: gr.Request, *asked: Any) -> Iterator[Changes]:
        """Draws what is asked for, or says what is wrong with it."""
        try:
            wanted = _read(*asked)
        except (CustomizedGRPOError, OSError) as error:
            yield {self._status: markup.error(str(error))}
            return
        yield from self._follow(wanted, request.session_hash or "")

    def _browse(self, request: gr.Request, *asked: Any) -> Iterator[Changes]:
        """Draws by other weights what is asked for, in place of what was asked for before."""
        owner = request.session_hash or ""
        try:
            wanted = _read(*asked)
        except (CustomizedGRPOError, OSError):
            return  # nothing to draw yet
        for job in self._session.jobs(owner):
            if job.request.example.id == wanted.example.id:
                job.cancel()
        yield from self._follow(wanted, owner)

    def _follow(self, wanted: Request, owner: str) -> Iterator[Changes]:
        """Puts a request into the queue and shows how far it is, then what came out."""
        try:
            job = self._session.submit(wanted, owner)
        except CustomizedGRPOError as error:
            yield {self._status: markup.error(str(error))}
            return
        while not job.wait(_POLL_SECONDS):
            yield {self._status: markup.progress(self._session, self._session.jobs(owner))}
        yield self._ended(job)

    def _ended(self, job: Job) -> Changes:
        try:
            outcome = job.result()
        except Cancelled:
            return self._after(job, markup.note("Cancelled."))
        except (CustomizedGRPOError, OSError) as error:
            return {self._status: markup.error(str(error))}
        except Exception as error:
            logger.exception("a request of the playground has failed")
            text = f"{type(error).__name__}: see the terminal. The page goes on working."
            return {self._status: markup.error(text)}
        return self._after(job, markup.note("Done.")) | self._show(outcome)

    def _after(self, job: Job, text: str) -> Changes:
        """The text, or how far the others are that the same person waits for."""
        others = self._session.jobs(job.owner)
        return {self._status: markup.progress(self._session, others) if others else text}

    def _show(self, outcome: Outcome) -> Changes:
        prompt = outcome.request.example.prompt
        changes: Changes = {self._answer: markup.answer(outcome, self._session.objectives)}
        for name, component in (("base", self._base), ("tuned", self._tuned)):
            drawn = getattr(outcome, name)
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

    def _stop(self, request: gr.Request) -> str:
        count = self._session.cancel(request.session_hash or "")
        return markup.note("Cancelling." if count else "There is nothing to cancel.")

    def _leave(self, request: gr.Request) -> None:
        self._session.cancel(request.session_hash or "")

    def _refresh(self) -> Changes:
        """The checkpoints that there are now."""
        trained = self._session.trained()
        return {
            self._trained: trained,
            self._place: gr.Slider(**_places(trained)),
            self._label: _label(trained, len(trained)),
        }


def _read(
    picture: dict[str, Any] | None,
    prompt: str,
    subject: str,
    seed: object,
    strength: object,
    place: int,
    trained: Sequence[Trained],
) -> Request:
    path = None if picture is None else Path(picture["path"])
    chosen = trained[int(place) - 1] if trained else None
    return read_request(path, prompt or "", seed, chosen, strength, subject or "")


def _places(trained: Sequence[Trained]) -> dict[str, Any]:
    """Fields of the slider along training."""
    count = len(trained)
    return {
        "minimum": 1,
        "maximum": max(count, 2),
        "value": max(count, 1),
        "label": "Checkpoint",
        "info": f"along training, 1 to {count}",
        "visible": count > 1,
    }


def _label(trained: Sequence[Trained], place: float) -> str:
    return markup.note(f"Tuned: {trained[int(place) - 1].label}") if trained else ""
