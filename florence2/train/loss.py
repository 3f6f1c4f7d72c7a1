"""The loss of a batch as a module, so that wrappers of modules (for several processes) can wrap it."""

from torch import Tensor, nn

from florence2.model.florence2 import Florence2Model
from florence2.train.data import Batch
from florence2.train.label_loss import answer_loss


class LossModule(nn.Module):
    """The sum of `Florence2Model.answer_loss` on a batch; every image goes through the vision tower once."""

    def __init__(self, model: Florence2Model):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of the labels, a scalar; divide by `batch.num_labels` for the mean."""
        features = self.model.encode_image(batch.pixel_values)[batch.image_index]  # (E, N, D)
        return answer_loss(self.model, features, batch.input_ids, batch.labels, batch.attention_mask)
