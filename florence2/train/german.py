"""Captions of made-up scenes in German: something that the specimen was never taught, to try fine-tuning with."""

from florence2.train.scenes import Scene, Thing

QUESTION = "What does the image describe, in German?"

_COLORS = {
    "red": "rot",
    "orange": "orange",
    "yellow": "gelb",
    "green": "grün",
    "cyan": "türkis",
    "blue": "blau",
    "purple": "violett",
    "pink": "rosa",
    "brown": "braun",
    "black": "schwarz",
    "white": "weiß",
}
_UNBENT = ("orange", "rosa")
_NOUNS = {
    "circle": ("Kreis", "er"),
    "square": ("Quadrat", "es"),
    "triangle": ("Dreieck", "es"),
    "star": ("Stern", "er"),
    "diamond": ("Raute", "e"),
    "cross": ("Kreuz", "es"),
    "heart": ("Herz", "es"),
    "arrow": ("Pfeil", "er"),
    "letter": ("Buchstabe", "er"),
    "digit": ("Ziffer", "e"),
    "word": ("Wort", "es"),
}
"""The word, and how an adjective before it ends: -er for masculine, -e for feminine, -es for neuter ones."""


def german_caption(scene: Scene) -> str:
    """Every thing with its colour, from left to right: "ein roter Kreis, eine rosa Raute und eine grüne Ziffer 7"."""
    *first, last = map(_named, scene.things)
    return f"{', '.join(first)} und {last}" if first else last


def _named(thing: Thing) -> str:
    kind, _, printed = thing.category.partition(" ")
    noun, ending = _NOUNS[kind]
    color = _COLORS[thing.color]
    article = "eine" if ending == "e" else "ein"
    words = (article, color if color in _UNBENT else color + ending, noun, printed)
    return " ".join(word for word in words if word)
