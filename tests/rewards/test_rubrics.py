"""The shipped criteria against a stand-in server that answers in each model's published form."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn", reason="tests/servers.py needs the extra [serve]")

import numpy as np
from helpers import ROOT
from PIL import Image
from servers import Reply, Request, scripted_server

from customized_grpo.errors import ConfigError
from customized_grpo.rewards.endpoints.answers import BadAnswer, ranking, rating
from customized_grpo.rewards.endpoints.rubrics import SHIPPED, load_rubric, messages
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudge, VlmJudgeConfig
from customized_grpo.types import Example

CPU = torch.device("cpu")
PROMPT = 'put it on a "beach" {output}'
EXAMPLE = Example(
    id="1", prompt=PROMPT, references=(torch.full((3, 32, 32), 0.2), torch.ones(3, 32, 32)),
    subject="cup",
)  # fmt: skip
OUTPUT = torch.full((1, 3, 32, 32), 0.6)
SOURCE, OTHER, MADE = 51, 255, 153  # grey levels of the pictures, which say which one it is

VIE = '{{\n\n"reasoning" : "the "cup" is\nthere",\n"score" : {},\n}}'
"""As UnifiedReward-Edit's question has it, quotes and last comma included: no valid JSON."""
RATIONAL = """\
# User Request Analysis
Text faithfulness matters most here.
# Detailed Judgement
1. Text Faithfulness:
## Justification: Image Faithfulness has a score of 1.0, this one not.
## Score: 3.5
2. Image Faithfulness:
## Justification: The background was kept.
## Score: 2.0
3. Physical and Visual Quality:
## Justification: Clean.
## Score: 3.2
4. Text Rendering:
## Justification: None was asked for.
## Score: N/A
# Summary: Score: 9

# User Request Refinement:
## Refined Request: Put the cup on a beach
"""
ACS = """\
Alignment Score (1-5): 2.694700002670288
Coherence Score (1-5): 2.371500015258789
Style Score (1-5): 2.802500009536743
"""
PUBLISHED = {  # criterion -> answers to its questions, the least and the mean of the aspects
    "edit-score": [VIE.format("[20, 15.5]"), '{"reasoning": "fine", "score": [22, 24]}'],
    "unified-reward-edit": [VIE.format("[20, 15.5]"), VIE.format("[22, 24]")],
    "unified-reward": [ACS],
    "rational-rewards-edit": [RATIONAL],
}
EXPECTED = {
    "edit-score": (15.5 / 2.5 * 22 / 2.5) ** 0.5,  # VIEScore: sqrt of the two least, out of 10
    "unified-reward-edit": (15.5 / 2.5 * 22 / 2.5) ** 0.5,
    "unified-reward": (2.694700002670288 + 2.371500015258789 + 2.802500009536743) / 3,
    "rational-rewards-edit": (3.5 + 2.0 + 3.2) / 3,
}
SEEN: dict[str, list[list[int]]] = {  # the pictures of each question, in order
    "edit-score": [[SOURCE, MADE], [MADE]],
    "unified-reward-edit": [[SOURCE, MADE], [MADE]],
    "unified-reward": [[MADE]],
    "rational-rewards-edit": [[SOURCE, MADE]],
}


def content(request: Request) -> list[dict[str, Any]]:
    """Of the user's message, as served: a chat completion with the message's parts."""
    assert request.path == "/v1/chat/completions"
    (*_, user) = json.loads(request.body)["messages"]
    assert user["role"] == "user"
    return user["content"]


def greys(request: Request) -> list[int]:
    urls = [part["image_url"]["url"] for part in content(request) if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
    return [int(np.array(picture)[0, 0, 0]) for picture in pictures]


def said(text: str) -> Reply:
    message = {"role": "assistant", "content": text}
    return Reply.json({"choices": [{"message": message, "finish_reason": "stop"}]})


def config(url: str, criterion: str, **fields: Any) -> VlmJudgeConfig:
    return VlmJudgeConfig(
        objective="prompt", base_url=f"{url}/v1", model="named", criterion=criterion, **fields
    )


def score(url: str, criterion: str, **fields: Any) -> tuple[float, tuple[str, ...]]:
    judge = config(url, criterion, concurrency=1, **fields).build(CPU)
    assert isinstance(judge, VlmJudge)
    return judge.score(OUTPUT, [EXAMPLE]).item(), judge.take_errors()


@pytest.mark.parametrize("criterion", PUBLISHED)
def test_a_named_judge_is_asked_and_read_in_its_published_form(criterion: str) -> None:
    answers = PUBLISHED[criterion]

    def answer(request: Request) -> Reply:
        body = json.loads(request.body)
        assert "response_format" not in body  # they were trained to answer in their own form
        assert (body["temperature"], body["model"]) == (0, "named")
        assert body["max_tokens"] == load_rubric(criterion).max_tokens
        return said(answers[len(requests) - 1])

    with scripted_server(answer) as (url, requests):
        value, errors = score(url, criterion)
    assert errors == ()
    assert value == pytest.approx(EXPECTED[criterion])
    assert [greys(request) for request in requests] == SEEN[criterion]
    texts = "".join(p["text"] for p in content(requests[0]) if p["type"] == "text")
    assert texts.count(json.dumps(PROMPT)) == 1  # its braces are no place


@pytest.mark.parametrize(
    ("criterion", "aspects", "expected"),
    [
        ("edit-score", ("success",), [20 / 2.5]),
        ("edit-score", ("artifacts",), [24 / 2.5]),
        ("unified-reward", ("alignment", "style"), [(2.694700002670288 + 2.802500009536743) / 2]),
        ("rational-rewards-edit", ("text_faithfulness", "text_rendering"), [3.5]),
    ],
)
def test_only_the_aspects_that_count_are_asked_for(
    criterion: str, aspects: tuple[str, ...], expected: list[float]
) -> None:
    answers = PUBLISHED[criterion]

    def answer(request: Request) -> Reply:
        return said(answers[0 if SOURCE in greys(request) or len(answers) == 1 else 1])

    with scripted_server(answer) as (url, requests):
        value, _ = score(url, criterion, aspects=aspects)
    assert [value] == pytest.approx(expected)
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("criterion", "text", "why"),
    [
        ("edit-score", '{"score": [20]}', "must be a list of 2 numbers, one for each of success"),
        ("edit-score", '{"score": 20}', "must be a list of 2 numbers"),
        ("edit-score", '{"score": [20, 26]}', "preservation must be from 0 to 25, got 26"),
        ("edit-score", '{"score": [true, "5"]}', "must be a list of 2 numbers"),
        ("edit-score", "It is fine.", "must be a list of 2 numbers"),
        ("unified-reward", "Alignment Score (1-5): 3", "has no score of coherence"),
        ("unified-reward", ACS.replace("2.8025", "7"), "style must be from 1 to 5, got 7"),
        ("rational-rewards-edit", RATIONAL.replace("## Score", "##"), "no score of text faith"),
    ],
)
def test_an_answer_in_another_form_is_no_score(criterion: str, text: str, why: str) -> None:
    with pytest.raises(BadAnswer, match=why):
        rating(load_rubric(criterion).questions[0], text)
    with scripted_server(lambda request: said(text)) as (url, _):
        value, (error,) = score(url, criterion)
    assert value != value
    assert error.startswith("1 of 1 images: named at ")


def test_no_aspect_that_counts_applies() -> None:
    with scripted_server(lambda request: said(RATIONAL)) as (url, _):
        value, (error,) = score(url, "rational-rewards-edit", aspects=("text_rendering",))
    assert value != value
    assert error.endswith("none of the aspects text_rendering applies")


def test_what_the_judge_says_in_its_summary_is_no_score() -> None:
    question = load_rubric("rational-rewards-edit").questions[0]
    again = RATIONAL.replace("# Summary: Score: 9", "# Summary:\nText Rendering: nothing to say.")
    assert rating(question, f"<think>1. Text Faithfulness:\nScore: 1\n</think>{again}") == {
        "text_faithfulness": 3.5, "image_faithfulness": 2.0, "physical_and_visual_quality": 3.2,
    }  # fmt: skip


def test_a_ranking_becomes_evenly_spaced_scores() -> None:
    assert ranking('{"reason": "x", "ranking": [2, 3, 1]}', 3) == [0.0, 1.0, 0.5]
    assert ranking('<think>{"ranking": [1, 2]}</think> {"ranking": [2, 1],}', 2) == [0.0, 1.0]
    for text in ('{"ranking": [1, 1]}', '{"ranking": [1, 2, 3]}', '{"ranking": 1}', "2, 1"):
        with pytest.raises(BadAnswer, match="must name each picture from 1 to 2 once"):
            ranking(text, 2)


def test_a_rubric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fur.yaml"
    file.write_text(
        "questions:\n"
        "  - answer: points\n"
        "    system: 'How furry is it? Answer {\"score\": 0 to 4}.'\n"
        "    user: '{references}Now: {output}'\n"
    )
    with scripted_server(lambda request: said('{"score": 3}')) as (url, requests):
        value, _ = score(url, str(file))
    assert value == 3
    assert greys(requests[0]) == [SOURCE, OTHER, MADE]
    assert [c.path for c in config(url, str(file)).checkpoints()] == [str(file)]  # it is recorded
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_rubric("~/fur.yaml") == load_rubric(str(file))
    assert config(url, "identity").checkpoints() == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("questions: []", "questions must have at least 1 item"),
        ("questions: [{answer: points, user: no picture}]", "user must hold {output} once"),
        ("questions: [{answer: ranking, user: '{output}'}]", "user must hold {outputs} once"),
        ("questions: [{answer: list, user: '{output}'}]", "answer is list: give both"),
        (
            "questions: [{answer: points, user: '{output}', scale: [0, 4]}]",
            "answer is points: remove them",
        ),
        (
            "questions: [{answer: list, user: '{output}', aspects: [a], scale: [4, 0]}]",
            "scale must ascend",
        ),
        ("combine: weakest\nquestions: [{answer: points, user: '{output}'}]", "combine must be"),
        (
            "questions:\n- {answer: ranking, user: '{outputs}'}\n- {answer: points, user: "
            "'{output}'}",
            "questions must be one if it asks for a ranking",
        ),
        ("questions: [{answer: essay, user: '{output}'}]", "answer must be"),
    ],
)
def test_mistakes_in_a_rubric_are_named(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_rubric(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"criterion": "edit-scor"},
            "criterion must be a shipped criterion .* 'edit-scor'.*edit-s",
        ),
        ({"criterion": "no/such.yaml"}, "criterion 'no/such.yaml' cannot be read"),
        ({"aspects": ("beauty",)}, "aspects must be of criterion edit-score, got 'beauty'; use"),
        ({"aspects": ()}, "aspects must name one"),
        ({"criterion": "prompt", "aspects": ("a",)}, "got 'a'; use null: it has none"),
        ({"logit_weighted": True}, "logit_weighted must be false for criterion edit-score"),
        (
            {"criterion": "prompt-ranking", "cache": "x"},
            "cache must be null for criterion prompt-r",
        ),
    ],
)
def test_options_that_mean_nothing_to_the_rubric_are_refused(
    fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        config("http://localhost", **{"criterion": "edit-score"} | fields)


def test_each_shipped_rubric_says_where_it_comes_from_and_is_in_the_docs() -> None:
    page = (ROOT / "docs/remote_rewards.md").read_text(encoding="utf-8")
    folder = ROOT / "src/customized_grpo/rewards/endpoints/criteria"
    for name in SHIPPED:
        head = (folder / f"{name}.yaml").read_text(encoding="utf-8").split("\nquestions:")[0]
        assert "our own words" in head.lower() or ("words are ours" in head and "arXiv:" in head)
        assert f"`{name}`" in page


def test_places_are_filled_in_once_and_texts_beside_each_other_are_one_part() -> None:
    question = load_rubric("identity-ranking").questions[0]
    system, user = messages(question, ["a", "b"], "{outputs}", "a {references} dog", ["r", "s"])
    assert system["role"] == "system"
    parts = [p.get("text") or p["image_url"]["url"] for p in user["content"]]
    assert parts == [
        'The subject: "a {references} dog". Reference pictures:', "r", "s",
        "The generated pictures:Picture 1:", "a", "Picture 2:", "b",
    ]  # fmt: skip
