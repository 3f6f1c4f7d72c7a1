"""Tokenizer, image settings and model: whether they belong to one checkpoint."""

from florence2.errors import CheckpointError
from florence2.inputs.image import ImageConfig
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.inputs.tokenizer_file import BEGIN, END, PADDING
from florence2.model.config import Florence2Config


def check_vocabulary(config: Florence2Config, tokenizer: FlorenceTokenizer) -> None:
    """Raise CheckpointError unless the embedding has one row for each token, and the special ids are the tokenizer's.

    More rows are allowed for the reasons of the two layouts only: the native one has a row for its `<image>`
    placeholder, and either may be padded to a multiple of 64. Anything else means that the ids are shifted.
    """
    tokens = tokenizer.vocab_size
    rows, image = config.text.vocab_size, config.image_token_id
    padded = tokens < rows == _round_up(tokens, 64)
    fits = tokens == rows or padded if image is None else image <= tokens <= rows
    if not fits:
        raise CheckpointError(
            f"The tokenizer has {tokens} tokens, but the model {rows} embeddings"
            + (f", the first {image} of them for tokens" if image is not None else "")
            + "; they belong to different checkpoints."
        )
    for key, token in (("bos_token_id", BEGIN), ("pad_token_id", PADDING), ("eos_token_id", END)):
        stated, id = getattr(config.text, key), tokenizer.token_id(token)
        if stated != id:
            raise CheckpointError(
                f"config.json states a {key} of {stated}, but the tokenizer gives {token} the id {id}; they belong to "
                "different checkpoints."
            )


def check_image_size(config: Florence2Config, images: ImageConfig) -> None:
    """Raise CheckpointError unless images of the stated size have positions in the grid and, as tokens, in the text."""
    grid, most = config.vision.grid_size(images.height, images.width), config.vision.max_position_embeddings
    size = f"Images of {images.width} x {images.height} pixels, the size in preprocessor_config.json, "
    if not all(1 <= side <= most for side in grid):
        raise CheckpointError(
            f"{size}give a grid of {grid[0]} x {grid[1]} positions, but the model knows 1 x 1 to {most} x {most}; "
            "choose another size, or a larger table with florence2.resize_positions."
        )
    tokens, positions = config.vision.image_tokens(images.height, images.width), config.text.max_position_embeddings
    if tokens >= positions:
        raise CheckpointError(
            f"{size}become {tokens} tokens, which leave no room for a prompt in the {positions} positions of the text "
            "encoder; choose a smaller size."
        )


def check_image_settings(config: Florence2Config, images: ImageConfig) -> None:
    """Raise CheckpointError where no image can pass, or `preprocessor_config.json` states another number of tokens."""
    check_image_size(config, images)
    tokens, stated = config.vision.image_tokens(images.height, images.width), images.image_seq_length
    if stated is not None and stated != tokens:
        raise CheckpointError(
            f"preprocessor_config.json states an image_seq_length of {stated}, but images of {images.width} x "
            f"{images.height} pixels become {tokens} tokens of this model; correct the size or the image_seq_length."
        )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
