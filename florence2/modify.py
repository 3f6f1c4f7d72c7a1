"""Change a loaded model so that its files still describe it: more tokens, tasks of its own, a larger position table.

Each function returns a new `Florence2` and leaves the one it was given as it was, for whoever else uses it. The new
model has modules of its own and shares the tensors that did not change, so it costs little memory; training either
changes both. Start from `copy.deepcopy(f)` where the old model has to stay as it is.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.answers.confidence import NO_CALIBRATION
from florence2.errors import ConfigError, plain, shown
from florence2.inputs.image import MAX_SIDE
from florence2.inputs.tasks import Task, TaskTable
from florence2.model.absent import require_complete
from florence2.model.config import MAX_SIZE
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from florence2.processor import Processor

NOISE = 0.02
"""The standard deviation of the noise in new embedding rows, as a share of that of the existing rows."""


def extend_vocabulary(f: Florence2, tokens: Sequence[str], *, seed: int = 0) -> Florence2:
    """Add special tokens to the tokenizer, the token embedding, the output and the configuration of a model.

    The new ids follow all existing ids, so `<loc_0>` to `<loc_999>` and all other tokens keep theirs. A new row is the
    mean of the existing rows plus a little noise: with the mean, an untrained token is less likely than any that the
    model would write, so answers stay what they were; without the noise, all new tokens would be equal, and the search
    could not choose between them until training had moved them apart. The new entries of `final_logits_bias` are zero.

    Args:
        f: The model; it is not changed, and shares all other tensors with the new one.
        tokens: Names such as "<depth_0>": angle brackets around anything but angle brackets and white space.
        seed: The seed of the noise; equal seeds give equal rows.

    Returns:
        A model with the larger vocabulary, without the spare rows that a padded embedding has, and without the
        calibration of the old one.

    Raises:
        PromptError: A token exists, occurs twice, or would split other text; or there is none.
        ConfigError: The seed is not a whole number of at least 0.
        Florence2Error: The model was loaded without some of its parts.
    """
    require_complete(f.model)
    seed = _check_number("seed", seed, 0, (1 << 63) - 1)
    tokenizer = f.processor.tokenizer.with_tokens(tokens)
    rows = tokenizer.vocab_size
    known = rows - len(tokens)
    model, generator = _copy(f.model), torch.Generator().manual_seed(seed)
    for embedding in (model.language_model.shared, model.language_model.decoder.embed_tokens):
        if embedding is not None:
            embedding.weight = _longer(embedding.weight, known, rows, generator)
            embedding.num_embeddings = rows
    if model.lm_head is not None:
        model.lm_head.weight = _longer(model.lm_head.weight, known, rows, generator)
    bias = model.final_logits_bias
    model.final_logits_bias = torch.cat([bias[:, :known], bias.new_zeros(1, rows - known)], dim=1)
    # the placeholder <image> of the native layout comes after the new tokens, where saving puts it
    model.config = replace(model.config, text=replace(model.config.text, vocab_size=rows), image_token_id=None)
    return _changed(f, model, f.processor.changed(tokenizer=tokenizer, calibration=NO_CALIBRATION))


def add_tasks(f: Florence2, tasks: Task | Iterable[Task]) -> Florence2:
    """Add tasks to a model; they are saved with it, in `tasks.json`, and found again by its token or alias.

    `f = florence2.add_tasks(f, Task("<DEPTH>", "How far away is each thing?"))`, then `f.run("<DEPTH>", image)` or
    `florence2 run depth photo.jpg --model FOLDER`.

    Args:
        f: The model; it is not changed, and shares everything but the tasks with the new one.
        tasks: One task, or several. A task that the model has already is not added again.

    Returns:
        The model with its old tasks and the new ones.

    Raises:
        PromptError: A task is malformed, or its token already means something else.
    """
    added = [tasks] if isinstance(tasks, Task) else list(tasks)
    table = TaskTable((*f.processor.tasks.own, *added))
    return _changed(f, f.model, f.processor.changed(tasks=table))


def resize_positions(
    f: Florence2, size: int, *, rows: int | None = None, image_size: tuple[int, int] | None = None
) -> Florence2:
    """Give the learned position table of the image grid another size, so that images of more pixels fit.

    The embeddings of rows and those of columns are stretched separately, by linear interpolation with aligned corners:
    the first and the last of the old positions become the first and the last of the new ones. An image of the old size
    therefore gets other positions than before; a model needs some training to answer as well as it did.

    Args:
        f: The model; it is not changed, and shares all other tensors with the new one.
        size: The rows, and also columns, of the new table: the largest grid in either direction.
        rows: How many of the old positions are stretched, the first ones; None is all. The published models have 50,
            but images of 768 pixels reach only the first 24, so the later ones were never trained: `rows=24` leaves
            them out.
        image_size: (width, height) in pixels that images are resized to from now on; None keeps it.

    Returns:
        The model with the new table, without the calibration of the old one; its configuration states the size.

    Raises:
        ConfigError: A number is out of range.
        CheckpointError: Images of `image_size` do not fit the new table or the text positions.
    """
    old = f.model.config.vision.max_position_embeddings
    size = _check_number("size", size, 1, MAX_SIZE)
    if rows is not None:
        rows = _check_number("rows", rows, 1, old)
    model = _copy(f.model)
    table = model.multi_modal_projector.image_position_embed
    for part in (table.row_embeddings, table.column_embeddings):
        part.weight = _stretched(part.weight, rows or old, size)
        part.num_embeddings = size
    model.config = replace(model.config, vision=replace(model.config.vision, max_position_embeddings=size))
    processor = f.processor if image_size is None else _with_image_size(f, image_size)
    return _changed(f, model, processor.changed(calibration=NO_CALIBRATION))


def _changed(f: Florence2, model: Florence2Model, processor: Processor) -> Florence2:
    return Florence2(model, processor, f.name, f._prepare)


def _copy(model: Florence2Model) -> Florence2Model:
    """Copy the modules of a model, which share its tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _longer(weight: Tensor, known: int, rows: int, generator: torch.Generator) -> nn.Parameter:
    """Return the first `known` rows of a weight (V, D), and new ones up to `rows`."""
    old = weight.detach()[:known]
    spread, mean = torch.std_mean(old.float().cpu(), dim=0)  # (D,) each, on a CPU, where every device draws the same
    noise = torch.randn(rows - known, len(mean), generator=generator)
    new = mean + NOISE * spread * noise
    return nn.Parameter(torch.cat([old, new.to(old.device, old.dtype)]), requires_grad=weight.requires_grad)


def _stretched(weight: Tensor, rows: int, size: int) -> nn.Parameter:
    """Return the first `rows` rows of a table (P, C) as `size` rows."""
    columns: Tensor = weight.detach()[:rows].float().T[None]  # (1, C, rows)
    stretched = F.interpolate(columns, size=size, mode="linear", align_corners=True)[0].T  # (size, C)
    return nn.Parameter(stretched.to(weight.dtype).contiguous(), requires_grad=weight.requires_grad)


def _with_image_size(f: Florence2, image_size: tuple[int, int]) -> Processor:
    """Return the processor of `f` for images of another size, (width, height)."""
    if not isinstance(image_size, tuple | list) or len(image_size) != 2:
        raise ConfigError(f"image_size is {shown(image_size)}; it must be (width, height) in pixels.")
    width = _check_number("The width of image_size", image_size[0], 1, MAX_SIDE)
    height = _check_number("The height of image_size", image_size[1], 1, MAX_SIDE)
    tokens = f.model.config.vision.image_tokens(height, width)
    images = replace(f.processor.image_config, height=height, width=width, image_seq_length=tokens)
    return f.processor.changed(image_config=images)


def _check_number(name: str, value: int, least: int, most: int) -> int:
    """Return a whole number as Python's. Raises ConfigError where it is out of range."""
    value = plain(value)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of {least} to {most}.")
    return value
