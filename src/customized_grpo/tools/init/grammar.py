"""The phrases that training prompts are made of. Our own; no benchmark's prompts are among them."""

from __future__ import annotations

OPENINGS = ("", "", "a photo of ", "a close-up of ", "a wide shot of ")

PLACES = (
    "on a wooden pier", "on a pebble beach", "in a birch forest", "on a mossy rock by a stream",
    "in a field of poppies", "on a mountain path", "in a rose garden", "under a blossoming tree",
    "on a snowy hill", "in the dunes by the sea", "beside a waterfall", "in a bamboo grove",
    "on a cobbled street", "in front of a shop window", "on a rooftop above a city",
    "in an underground station", "on a park bench", "in a market hall", "on a balcony with plants",
    "in a living room with a fireplace", "in a bright kitchen", "on a striped carpet",
    "in a library", "in a painter's studio", "in an old workshop", "in a train compartment",
    "on a theatre stage", "in a museum hall", "in a greenhouse", "in a hotel lobby",
)  # fmt: skip

LIGHTS = (
    "", "", "", "at sunrise", "in golden evening light", "in morning fog", "in the rain",
    "under a starry sky", "by candlelight", "in bright midday sun", "during a snowfall",
)  # fmt: skip

COMPANIONS = (
    "next to a red bicycle", "next to a stack of books", "beside a large sunflower",
    "next to a wicker basket", "beside a blue suitcase", "next to a paper lantern",
    "beside a globe", "next to a watering can", "beside a grand piano",
    "next to a bunch of balloons", "beside a wooden ladder", "next to a snowman",
    "beside a pile of pumpkins", "next to a telescope", "beside a bowl of oranges",
)  # fmt: skip

ACTIONS = (
    "sitting", "standing", "lying", "resting", "looking up", "looking into the distance",
    "seen from the side", "seen from behind",
)  # fmt: skip

COLORS = (
    "red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "white", "black",
    "golden", "silver", "striped", "spotted", "rainbow-coloured",
)  # fmt: skip

# Before the class, which keeps its shape: "an oil painting of a dog", "a dog made of clay".
STYLES = (
    "an oil painting of {}", "a watercolour of {}", "a charcoal drawing of {}", "a woodcut of {}",
    "a comic drawing of {}", "a mosaic of {}", "a bronze statue of {}", "a marble statue of {}",
    "{} made of clay", "{} made of folded paper", "{} knitted from wool", "{} made of glass",
    "{} made of wood", "{} made of ice",
)  # fmt: skip

WORN = (
    "wearing a straw hat", "wearing a knitted scarf", "wearing round glasses", "wearing sunglasses",
    "wearing a yellow raincoat", "wearing a red bow tie", "wearing a flower crown",
    "wearing headphones", "wearing a woollen jumper", "wearing a pirate hat", "wearing a bandana",
    "wearing a denim jacket", "wearing a chef's hat", "wearing a small backpack",
    "wearing a superhero cape", "wearing a party hat", "wearing a life jacket",
    "dressed as an astronaut", "dressed as a gardener", "dressed as a detective",
)  # fmt: skip

ADDED = (
    "with a red ribbon tied around it", "with a sticker of a star on it", "with a price tag on it",
    "with a small flag stuck to it", "with a string of lights around it", "with a party hat on top",
    "with a knitted cover", "with a flower on top", "with a straw hat on top", "with googly eyes",
    "with a lace doily under it", "with snow on top", "with a leather strap around it",
    "with a butterfly on it", "with a bell hanging from it", "with drops of water all over it",
    "with a glass dome over it", "with gift paper half around it",
)  # fmt: skip

# Beginnings of words that are spoken with a vowel, and of some that are only written with one.
VOWELS = ("a", "e", "i", "o", "u", "hour", "honest", "heir")
NO_VOWELS = ("eu", "one", "ufo", "ukulele", "unic", "unif", "union", "unit", "univ", "use")
