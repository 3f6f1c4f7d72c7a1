"""The loss of a batch as a module, so that wrappers of modules (for several processes) can wrap it."""

from torch import Tensor, nn

from florence2.model.florence2 import Florence2Model
from florence2.train.data import Batch
from florence2.train.label_loss import answer_loss


class LossModule(nn.Module):
    """The summed `Florence2Model.answer_loss` of a batch; an image is encoded once, or not at all where it is stored.

    The text encoder runs for every pair: its attention goes both ways, so the image tokens change with the prompt, and
    only equal prompts on one image could share it. Such data is rare.
    """

    def __init__(self, model: Florence2Model):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of the labels, a scalar; divide by `batch.num_labels` for the mean."""
        features = self._encode_images(batch)[batch.image_index]  # (E, N, D)
        return answer_loss(self.model, features, batch.input_ids, batch.labels, batch.attention_mask)

    def _encode_images(self, batch: Batch) -> Tensor:
        """Return the image tokens (P, N, D), from stored outputs of a frozen vision tower where the batch has them."""
        if batch.grids is None:
            return self.model.encode_image(batch.pixel_values)
        tokens: Tensor = self.model.multi_modal_projector(batch.grids.to(self.model.dtype))
        return tokens
