"""Twelve questions about the model that a reader of docs/how-it-works alone can answer, with the answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question, its answer in full, the chapter that answers it, and what that chapter must therefore say."""

    text: str
    answer: str
    chapter: str
    evidence: tuple[str, ...]


QUESTIONS = (
    Question(
        "A user writes <OD>. What does the network read, and what happens to a program that feeds it '<OD>' itself?",
        "The sentence 'Locate the objects with category name in the image.', framed by <s> and </s>. The task's token "
        "is no token of the vocabulary, so as text it falls into pieces; nothing fails, and the answer means nothing.",
        "prompt",
        ("Locate the objects with category name in the image.", "it falls into pieces", "Nothing fails"),
    ),
    Question(
        "How does a pixel coordinate x become a location token in a prompt, and which is the largest?",
        "bin = floor(1000 x / W), at most 999, so <loc_999>; W is the width of the original image. y uses the height.",
        "prompt",
        ("min( floor( 1000 x / W ), 999 )", "thousandths of the image's width or height"),
    ),
    Question(
        "A photograph has 600 x 400 pixels. What does the network see, and why do boxes fit the photograph?",
        "It sees 768 x 768, squashed. Locations are shares of width and height, which resizing keeps; code multiplies "
        "them with the size of the original image.",
        "pixels",
        ("768 x 768", "share of the width or of the height", "*original* image"),
    ),
    Question(
        "Why does DaViT need both kinds of attention?",
        "Window attention relates places inside a small window and nothing beyond it. Channel attention relates maps "
        "over the whole image, so everything reaches everything, but no place is compared with another. Each costs an "
        "amount that grows with the number of places, not with its square.",
        "davit",
        ("only inside a small window", "compares the whole image at once", "both grow with P, not P²"),
    ),
    Question(
        "In channel attention: what are the tokens, what are their features, and by what are the scores divided?",
        "Tokens are the channels of a group, features their values at all places; the scores are divided by the root "
        "of the number of places.",
        "davit",
        ("d x d scores: rows are channels, P columns are places", "root of the number of places"),
    ),
    Question(
        "The grid is 20 x 20 and the window 12. What does the tower do at the border, and what must a port not do?",
        "It adds zeros on the right and at the bottom, to 24 x 24. They must not be masked: after the linear layer "
        "they are its bias, and real places attend to them.",
        "davit",
        ("on the right and at the bottom", "not masked", "not zero but its bias"),
    ),
    Question(
        "Where do the 577 image tokens come from, in which order, and what carries their position?",
        "24 x 24 places and their mean; the mean is first, the places follow row by row. A learned embedding of "
        "column and row, half of the channels each, column first, is added before the projection.",
        "projection",
        ("24 · 24 = 576", "[ mean of all x ; x(0,0) ; x(0,1)", "half of the channels for the column"),
    ),
    Question(
        "Where do the tower and BART put their LayerNorms?",
        "The tower normalises the input of a branch and never the sum (pre-norm); BART normalises the sum (post-norm).",
        "encoder-decoder",
        ("normalises the *sum* (post-norm)", "normalises the branch's input and never the sum"),
    ),
    Question(
        "How many tokens may a prompt have with base, and why?",
        "447: the encoder has 1,024 positions for image and prompt together, and the image takes 577.",
        "encoder-decoder",
        ("1,024 positions", "577 are the image", "447"),
    ),
    Question(
        "Two prompts of different length form a batch. When are the answers those of the single prompts?",
        "When the padding is masked. Microsoft's code attends to the padding, so its batches of such prompts differ.",
        "encoder-decoder",
        ("if padding is masked", "attends to the padding"),
    ),
    Question(
        "With three beams: how many candidates does a step compare, which of them may become hypotheses, and how is a "
        "hypothesis scored?",
        "Six, the 2K best of all K·V sums. Those that end in </s> and rank among the first three. The score is the sum "
        "of log-probabilities divided by length^length_penalty, where <s> and </s> count.",
        "beam-search",
        ("**2K best**", "ranks among the first K", "score = sum of log-probabilities / L^p"),
    ),
    Question(
        "Why does a perfect box score 0.10, and what does its label contribute?",
        "The score is the geometric mean of the probabilities of the four locations, and an edge's probability is "
        "spread over two dozen neighbouring bins. The label contributes nothing.",
        "answers",
        ("geometric mean of the probabilities of its four locations", "share the probability", "label does not count"),
    ),
)
