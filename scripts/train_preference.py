"""Trains the embedded preference model: which of two pictures would one pick for the prompt?

python scripts/train_preference.py --init build/reward-clip/model --out build/reward-preference

A CLIPModel that is tuned on choices, as PickScore is (arXiv:2305.01569): ``exp(logit_scale) *
cosine`` is a score, and a picture is preferred with the sigmoid of the difference (Bradley-Terry).
The choices follow a *grade*: .6 of the share of what the prompt asks for that is there, and .4 of
picture quality. As people do, it likes a good-looking picture whatever it shows: a sharp copy of
the reference loses about half of the range and not all of it. Quality falls with the strength of
the faults that a picture is given, those of a small generator. Resumable. At the end it prints
what held-out subjects get.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from _tokenizers import MAX_TOKENS, clip_tokenizer
from _training import Run
from torch import Tensor
from train_rewards import pixels, save
from transformers import CLIPModel

from customized_grpo.data.emoji.world import SIZE, Attributes, EmojiWorld, attribute_values

ALIGNMENT, QUALITY = 0.6, 0.4  # their weights in the grade
CONSISTENCY = 20.0  # of the choices: a grade that is better by .1 wins 88 % of them
# The pictures of a prompt, see _find_wrong.
RIGHT, MISSED, SOME_WRONG, OTHER_SUBJECT, ALL_WRONG, COPY = 0, (1, 2, 3), 4, 5, 6, 7
NUM_CANDIDATES = 8
EXAMINED = {
    "right": RIGHT,
    "one thing missed": MISSED[0],
    "another subject": OTHER_SUBJECT,
    "copy": COPY,
    "nothing right": ALL_WRONG,
}
NUM_ASKED = 6  # scene, placement, prop, colour, accessory, noun
# Amounts from strength 0, hardly to be seen, to 1, all quality gone; geometric in between.
FAULTS: dict[str, tuple[float, float]] = {
    "blur": (0.4, 2.5),  # standard deviation in pixels
    "blocks": (56, 14),  # number of them along a side
    "codec": (7, 1.5),  # frequencies that 8 x 8 patches keep along a side: a VAE's softness
    "noise": (0.02, 0.25),  # standard deviation
    "melt": (0.3, 3.0),  # standard deviation in pixels of how far each place is moved
}
BLEND = (0.05, 0.5)  # mean share of another picture, patch by patch


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """Pictures ``[B, 3, 64, 64]`` of P prompts in turn, what they show, and how good they look."""

    images: Tensor
    quality: Tensor
    """``[B]`` in [0, 1]."""
    there: Tensor
    """Share of what a prompt asks for that is in a picture, ``[P, B]``."""

    @property
    def grades(self) -> Tensor:
        """Of each picture for each prompt, ``[P, B]`` in [0, 1]."""
        return ALIGNMENT * self.there + QUALITY * self.quality


class Gallery:
    """Endless prompts, with sharp pictures that show all, some or nothing of what they ask for."""

    def __init__(self, split: str) -> None:
        self._world, self._tokenizer = EmojiWorld(split), clip_tokenizer()
        nouns = sorted({subject.noun for subject in self._world.subjects})
        self._nouns = torch.tensor([nouns.index(s.noun) for s in self._world.subjects])

    def sample(self, num_prompts: int, rng: torch.Generator) -> tuple[Tensor, Graded]:
        """Token ids ``[P, length]`` and ``NUM_CANDIDATES`` pictures of each prompt."""
        batch = self._world.sample(num_prompts, rng)
        asked = self._describe(batch.subject, batch.attributes)
        wrong = _find_wrong(asked, rng).flatten(0, 1)
        rows = torch.arange(num_prompts).repeat_interleave(NUM_CANDIDATES)
        subjects = self._world.indices
        others = subjects[torch.randint(len(subjects), rows.shape, generator=rng)]
        subject = torch.where(wrong[:, -1], others, batch.subject[rows])
        attributes = _change(batch.attributes, rows, wrong, rng)
        images, _ = self._world.render(subject, attributes, rng)
        shown = self._describe(subject, attributes)
        hits = (asked[:, None] == shown) & (asked[:, None] > 0)
        there = hits.sum(2) / (asked > 0).sum(1, keepdim=True)
        graded = Graded(images=images, quality=torch.ones(len(images)), there=there)
        return self._tokenize(batch.prompts), graded

    def _describe(self, subject: Tensor, attributes: Attributes) -> Tensor:
        """Values ``[B, NUM_ASKED]``; 0 = nothing."""
        a, noun = attributes, self._nouns[subject]
        return torch.stack(
            [a.scene + 1, a.placement + 1, a.prop, a.color, a.accessory, noun + 1], 1
        )

    def _tokenize(self, prompts: list[str]) -> Tensor:
        length = MAX_TOKENS + 2
        tokens = self._tokenizer(
            prompts, padding="max_length", max_length=length, return_tensors="pt"
        )
        return tokens.input_ids


def _find_wrong(asked: Tensor, rng: torch.Generator) -> Tensor:
    """Which of ``asked`` ``[P, NUM_ASKED]`` each candidate gets wrong,
    ``[P, NUM_CANDIDATES, NUM_ASKED]``."""
    wrong = torch.zeros(len(asked), NUM_CANDIDATES, NUM_ASKED, dtype=torch.bool)
    # Scene and placement are always asked for, a prop, a colour and an accessory half of the time.
    chance = (asked[:, :-1] > 0) * torch.tensor([1.0, 1.0, 4.0, 4.0, 2.0])
    missed = torch.multinomial(chance, len(MISSED), generator=rng)
    for candidate, column in zip(MISSED, missed.unbind(1), strict=True):
        wrong[torch.arange(len(asked)), candidate, column] = True
    wrong[:, SOME_WRONG] = torch.rand(len(asked), NUM_ASKED, generator=rng) < 0.5
    wrong[:, OTHER_SUBJECT, -1] = True
    wrong[:, ALL_WRONG] = True
    wrong[:, COPY, :-1] = True
    wrong[:, COPY, 1] = torch.rand(len(asked), generator=rng) < 2 / 3  # of three placements
    return wrong


def _change(wanted: Attributes, rows: Tensor, wrong: Tensor, rng: torch.Generator) -> Attributes:
    """What pictures of ``rows`` show: another value, or nothing half of the time, where wrong."""
    nothing = torch.rand(len(rows), generator=rng) < 0.5
    nothing[COPY::NUM_CANDIDATES] = True
    changed = {}
    for column, field in enumerate(fields(Attributes)):
        values = attribute_values(field.name)
        value = getattr(wanted, field.name)[rows]
        other = (value + torch.randint(1, len(values), rows.shape, generator=rng)) % len(values)
        other = torch.where(nothing, 0, other) if values[0] == "none" else other
        changed[field.name] = torch.where(wrong[:, column], other, value)
    return Attributes(**changed)


def degrade(graded: Graded, rng: torch.Generator) -> Graded:
    """Two of five pictures get a fault, one of four is blended with another of its prompt."""
    count = len(graded.images)
    blend = torch.rand(count, generator=rng) * (torch.rand(count, generator=rng) < 0.25)
    graded = _blend(graded, blend, rng)
    images, quality = graded.images.clone(), graded.quality.clone()
    kind = torch.randint(len(FAULTS), (count,), generator=rng)
    spared = torch.rand(count, generator=rng) < 0.4
    for number, name in enumerate(FAULTS):
        rows = ((kind == number) & ~spared).nonzero()[:, 0]
        strength = torch.rand(len(rows), generator=rng)
        images[rows] = add_fault(images[rows], name, strength, rng)
        quality[rows] *= 1 - strength
    return Graded(images=images, quality=quality, there=graded.there)


def _blend(graded: Graded, strength: Tensor, rng: torch.Generator) -> Graded:
    """A share of another picture of the prompt in patches of 16 px; strength 0 leaves it alone."""
    count = len(strength)
    row = torch.arange(count)
    ahead = torch.randint(1, NUM_CANDIDATES, (count,), generator=rng)
    other = row - row % NUM_CANDIDATES + (row + ahead) % NUM_CANDIDATES
    share = _amount(BLEND, strength) * (strength > 0)
    patches = 2 * torch.rand(count, 1, 4, 4, generator=rng) * share.view(-1, 1, 1, 1)
    mask = F.interpolate(patches, size=(SIZE, SIZE), mode="bilinear")
    return Graded(
        images=torch.lerp(graded.images, graded.images[other], mask),
        quality=graded.quality * (1 - strength),
        there=torch.lerp(graded.there, graded.there[:, other], share),
    )


def add_fault(images: Tensor, name: str, strength: Tensor, rng: torch.Generator) -> Tensor:
    """``images`` [B, 3, 64, 64] with one of ``FAULTS``, of ``strength`` [B] in [0, 1]."""
    amount = _amount(FAULTS[name], strength).view(-1, 1, 1)
    if name in ("noise", "melt"):
        return {"noise": _noise, "melt": _melt}[name](images, amount.unsqueeze(1), rng)
    line = {"blur": _blur, "blocks": _blocks, "codec": _codec}[name](amount).unsqueeze(1)
    return (line @ images @ line.mT).clamp(0, 1)


def _amount(limits: tuple[float, float], strength: Tensor) -> Tensor:
    least, most = limits
    return least * (most / least) ** strength


def _noise(images: Tensor, amount: Tensor, rng: torch.Generator) -> Tensor:
    """Of grains of 1, 2 or 4 pixels."""
    side = SIZE >> int(torch.randint(3, (), generator=rng))
    noise = torch.randn(len(images), 3, side, side, generator=rng)
    return (images + amount * F.interpolate(noise, size=(SIZE, SIZE))).clamp(0, 1)


def _melt(images: Tensor, amount: Tensor, rng: torch.Generator) -> Tensor:
    """Moves every place, neighbours alike: stripes break, outlines run."""
    shift = torch.randn(len(images), 2, 9, 9, generator=rng) * amount * 2 / SIZE
    shift = F.interpolate(shift, size=(SIZE, SIZE), mode="bilinear").permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(len(images), -1, -1), list(images.shape), False)
    return F.grid_sample(images, still + shift, padding_mode="reflection", align_corners=False)


def _blur(amount: Tensor) -> Tensor:
    """Gaussian weights ``[B, 64, 64]`` of a line of pixels, rows sum to 1."""
    axis = torch.arange(SIZE)
    distance = (axis[:, None] - axis).square()
    return F.softmax(-distance / (2 * amount.square()), dim=2)


def _blocks(amount: Tensor) -> Tensor:
    """Weights ``[B, 64, 64]`` that give each pixel of a line the mean of its block."""
    block = (torch.arange(SIZE) * amount / SIZE).floor()
    same = (block == block.mT).float()
    return same / same.sum(2, keepdim=True)


def _codec(amount: Tensor) -> Tensor:
    """Weights ``[B, 64, 64]`` that leave each run of 8 pixels its lowest DCT frequencies."""
    n = torch.arange(8.0)
    basis = torch.cos(math.pi * (n + 0.5) * n[:, None] / 8) / 2
    basis[0] /= math.sqrt(2)
    patch = basis.T @ ((amount - n.view(-1, 1)).clamp(0, 1) * basis)
    return patch.repeat(1, 8, 8) * torch.block_diag(*torch.ones(8, 8, 8))


def score(model: CLIPModel, tokens: Tensor, images: Tensor) -> Tensor:
    """Scores ``[P, B]`` of every picture for every prompt."""
    text = model.get_text_features(input_ids=tokens).pooler_output
    image = model.get_image_features(pixel_values=pixels(images)).pooler_output
    cosine = F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T
    return model.logit_scale.exp().clamp(max=100) * cosine


def compare(scores: Tensor, grades: Tensor) -> tuple[Tensor, Tensor]:
    """Bradley-Terry loss over all pairs of ``[..., B]``, and the share that the grade confirms."""
    gap, better = (x.unsqueeze(-1) - x.unsqueeze(-2) for x in (scores, grades))
    loss = F.binary_cross_entropy_with_logits(gap, torch.sigmoid(CONSISTENCY * better))
    pairs = better > 0
    return loss, (gap[pairs] > 0).float().mean()


def own(values: Tensor) -> Tensor:
    """Of ``[P, B]`` what belongs to the pictures of each prompt, ``[P, NUM_CANDIDATES]``."""
    prompts = torch.arange(len(values))
    return values.unflatten(1, (-1, NUM_CANDIDATES))[prompts, prompts]


def preference_loss(
    model: CLIPModel, gallery: Gallery, num_prompts: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Over pairs of a prompt's own pictures and of all pictures; accuracy on the former."""
    tokens, sharp = gallery.sample(num_prompts, rng)
    graded = degrade(sharp, rng)
    tone = torch.rand(2, len(graded.images), 3, 1, 1, generator=rng) * 2 - 1
    images = (graded.images * (1 + 0.1 * tone[0, :, :1]) + 0.03 * tone[1]).clamp(0, 1)
    scores = score(model, tokens, images)
    loss, accuracy = compare(own(scores), own(graded.grades))
    return loss + 0.5 * compare(scores, graded.grades)[0], accuracy


@torch.no_grad()
def examine(model: CLIPModel, num_prompts: int, seed: int) -> str:
    """What held-out subjects get, as a table.

    grade, score: means on one scale each, from a blurred picture of which nothing is right, 0, to
    what was asked for, sharp, 1. beaten: how often the latter scores higher.
    """
    rng = torch.Generator().manual_seed(seed)
    tokens, sharp = Gallery("held_out").sample(num_prompts, rng)
    graded = degrade(sharp, rng)
    _, accuracy = compare(own(score(model, tokens, graded.images)), own(graded.grades))
    scores, grades = {}, {}
    for strength in (0.0, 0.5, 1.0):
        images = sharp.images
        if strength:
            images = add_fault(images, "blur", torch.full((len(images),), strength), rng)
        found = own(score(model, tokens, images))
        for name, candidate in EXAMINED.items():
            scores[name, strength] = found[:, candidate]
            there = own(sharp.there)[:, candidate]
            grades[name, strength] = ALIGNMENT * there + QUALITY * (1 - strength)
    best, worst = ("right", 0.0), ("nothing right", 1.0)
    lines = [f"{'picture':<20}{'blur':>6}{'grade':>8}{'score':>8}{'beaten':>8}"]
    for name, strength in scores:
        grade, value = (
            (of[name, strength] - of[worst]).mean() / (of[best] - of[worst]).mean()
            for of in (grades, scores)
        )
        beaten = (scores[best] > scores[name, strength]).float().mean()
        lines.append(f"{name:<20}{strength:6.1f}{grade:8.2f}{value:8.2f}{beaten:8.2f}")
    low, high = (scores[place].mean() for place in (worst, best))
    copies = (scores["copy", 0.0] > scores[worst]).float().mean()
    lines += [
        f"scores of 0 and 1: {low:.1f} and {high:.1f}",
        f"a copy beats a blurred picture with nothing right: {copies:.3f}",
        f"all pairs of a prompt's pictures with faults, as their grades say: {accuracy:.3f}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", type=Path, required=True, help="CLIPModel to start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16, help="prompts, of 8 pictures each")
    # 1e-3 would undo what the start knows of props and colours.
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=6)
    args = parser.parse_args()
    model = CLIPModel.from_pretrained(args.init, dtype=torch.float32, attn_implementation="eager")
    run = Run(args.out, model, peak_lr=args.lr, num_steps=args.steps)
    gallery = Gallery("train")
    while run.step < args.steps:
        loss, accuracy = preference_loss(model, gallery, args.batch, run.rng(args.seed))
        run.update(loss, accuracy=accuracy.item())
    model.load_state_dict(run.ema.shadow)
    save(model, "clip", clip_tokenizer(), args.out / "model")
    print(examine(model.float(), 256, args.seed))


if __name__ == "__main__":
    main()
