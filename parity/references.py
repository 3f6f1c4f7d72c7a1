"""The references behind one interface: transformers' native model and Microsoft's remote code."""

import importlib.metadata
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from florence2.checkpoints.config_files import GENERATION_SETTINGS, read_config
from florence2.generation.options import GenerationOptions
from florence2.model.config import Layout
from florence2.model.florence2 import Florence2Model

_NEVER_CHOSEN = -1e9
Inside: TypeAlias = dict[str, list[Tensor]]
"""Values inside one pass, by stage and layer, in the shapes of our model."""


class Reference(Protocol):
    """The methods that every reference offers. `ids` are a prompt's; `pixel_values` are (1, 3, H, W)."""

    name: str
    model: Any
    """Its module, in evaluation mode."""
    layout: Layout
    """The layout of its parameter names."""
    attends_to_padding: bool
    """If set, padding a prompt changes the results."""

    def pixels(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into pixel_values."""
        ...

    def features(self, pixel_values: Tensor) -> Tensor:
        """Return the projected image tokens (1, N, D)."""
        ...

    def encode(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        """Return the memory (1, N + T, D)."""
        ...

    def logits(self, pixel_values: Tensor, ids: Sequence[int], decoder_ids: Sequence[int]) -> Tensor:
        """Return the logits (1, T, V)."""
        ...

    def loss(self, pixel_values: Tensor, ids: Sequence[int], labels: Sequence[int]) -> float:
        """Return the training loss."""
        ...

    def batch_loss(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the training loss of a padded batch with its graph; arguments as for `Florence2Model.loss`."""
        ...

    def generate(
        self, pixel_values: Tensor, ids: Sequence[int], options: GenerationOptions
    ) -> tuple[list[list[int]], list[list[float]], list[float] | None]:
        """Return sequences, token log-probabilities, and the beams' scores if the search has beams."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with start and end id."""
        ...

    def detokenize(self, ids: Sequence[int], skip_special: bool) -> str:
        """Return the text of ids."""
        ...

    def sentence(self, prompt: str) -> str:
        """Return the sentence that the model reads for a prompt with a task token."""
        ...


class Native:
    """transformers.models.florence2 on a checkpoint; one in Microsoft's layout is converted first.

    The native layout has no final_logits_bias, so it goes into the bias of the output projection. The extra rows of a
    converted embedding get a bias that makes them impossible.
    """

    layout: Layout = "native"
    attends_to_padding = False

    def __init__(self, folder: Path, ours: Florence2Model, dtype: torch.dtype):
        from transformers import Florence2ForConditionalGeneration

        self.name = f"native, transformers {importlib.metadata.version('transformers')}"
        self.dtype = dtype
        self._scratch = tempfile.TemporaryDirectory()
        if read_config(folder).layout == "microsoft":
            folder = _convert(folder, Path(self._scratch.name))
        self.model = Florence2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.folder = folder
        head = self.model.lm_head
        known = ours.final_logits_bias.shape[1]
        bias = torch.full((head.weight.shape[0],), _NEVER_CHOSEN, dtype=dtype)
        bias[:known] = ours.final_logits_bias[0].to(dtype)
        head.bias = nn.Parameter(bias, requires_grad=False)
        self.known = known
        self.grid_size = ours.config.vision.grid_size

    def pixels(self, image: Image.Image) -> Tensor:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(self.folder)
        values: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return values

    def features(self, pixel_values: Tensor) -> Tensor:
        inner = self.model.model
        tokens: Tensor = inner.multi_modal_projector(inner.vision_tower(pixel_values.to(self.dtype)).last_hidden_state)
        return tokens

    def encode(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        output = self._forward(pixel_values, ids, decoder_input_ids=torch.tensor([[2]]))
        encoded: Tensor = output.encoder_last_hidden_state
        return encoded

    def logits(self, pixel_values: Tensor, ids: Sequence[int], decoder_ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._forward(pixel_values, ids, decoder_input_ids=torch.tensor([decoder_ids])).logits
        return logits[:, :, : self.known]

    def loss(self, pixel_values: Tensor, ids: Sequence[int], labels: Sequence[int]) -> float:
        return float(self._forward(pixel_values, ids, labels=torch.tensor([labels])).loss)

    def batch_loss(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        places = self._image_places(pixel_values)
        output = self.model(
            input_ids=torch.cat([places, input_ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(places), attention_mask], dim=1),
            pixel_values=pixel_values.to(self.dtype),
            labels=labels,
        )
        loss: Tensor = output.loss
        return loss

    def inside(self, pixel_values: Tensor, ids: Sequence[int], decoder_ids: Sequence[int]) -> Inside:
        """Return attention weights and hidden states, by the stages of `parity.attentions`.

        `output_attentions` has those of the text model. For the vision tower, a recording attention function replaces
        the one that the configuration names.
        """
        seen: dict[str, list[Tensor]] = {"Window": [], "Channel": []}
        with torch.no_grad(), _recording_attention(self.model, seen):
            blocks = self.model.model.vision_tower(pixel_values.to(self.dtype), output_hidden_states=True).hidden_states
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        with torch.no_grad():
            output = self._forward(
                pixel_values,
                ids,
                decoder_input_ids=torch.tensor([decoder_ids]),
                output_attentions=True,
                output_hidden_states=True,
            )
        self.model.set_attn_implementation(before)
        depth = sum(self.model.config.vision_config.depths)
        return {
            "windows": seen["Window"],
            "channel groups": seen["Channel"],
            "vision blocks": [block.permute(0, 2, 3, 1) for block in blocks[-depth:]],
            "encoder attention": list(output.encoder_attentions),
            "encoder layers": list(output.encoder_hidden_states[1:]),
            "decoder self-attention": list(output.decoder_attentions),
            "cross-attention": list(output.cross_attentions),
            "decoder layers": list(output.decoder_hidden_states[1:]),
        }

    def generate(
        self, pixel_values: Tensor, ids: Sequence[int], options: GenerationOptions
    ) -> tuple[list[list[int]], list[list[float]], list[float] | None]:
        self.model.generation_config = _generation_config(options)
        inputs = {"input_ids": self._with_image(pixel_values, ids), "pixel_values": pixel_values.to(self.dtype)}
        output = self.model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
        return _unpack(self.model, output)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer()(text)["input_ids"]
        return ids

    def detokenize(self, ids: Sequence[int], skip_special: bool) -> str:
        text: str = self._tokenizer().decode(ids, skip_special_tokens=skip_special)
        return text

    def sentence(self, prompt: str) -> str:
        from transformers import AutoProcessor

        if not hasattr(self, "_processor"):
            self._processor = AutoProcessor.from_pretrained(self.folder)
        sentence: str = self._processor._construct_prompts([prompt])[0]
        return sentence

    def _tokenizer(self) -> Any:
        from transformers import BartTokenizerFast

        if not hasattr(self, "_fast"):
            self._fast = BartTokenizerFast.from_pretrained(self.folder)
        return self._fast

    def _with_image(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        return torch.cat([self._image_places(pixel_values), torch.tensor([ids])], dim=1)

    def _image_places(self, pixel_values: Tensor) -> Tensor:
        """Return the placeholder ids (B, N) of the image tokens: the mean over the grid, then its positions."""
        rows, columns = self.grid_size(*pixel_values.shape[-2:])
        return torch.full((len(pixel_values), 1 + rows * columns), self.model.config.image_token_id)

    def _forward(self, pixel_values: Tensor, ids: Sequence[int], **others: Any) -> Any:
        input_ids = self._with_image(pixel_values, ids)
        return self.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=pixel_values.to(self.dtype),
            **others,
        )


@contextmanager
def _recording_attention(model: Any, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Within the block, collect the weights of the vision tower's attentions in `seen`, by kind."""
    from transformers.modeling_utils import AttentionInterface
    from transformers.models.florence2.modeling_florence2 import eager_attention_forward

    def attend(module: nn.Module, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        mixed, weights = eager_attention_forward(module, *arguments, **named)
        kind = "Window" if "Window" in type(module).__name__ else "Channel"
        seen[kind].append(weights)
        return mixed, weights

    AttentionInterface.register("recording", attend)
    config = model.model.vision_tower.config
    before, config._attn_implementation = config._attn_implementation, "recording"
    try:
        yield
    finally:
        config._attn_implementation = before


class Remote:
    """Microsoft's code, from a folder of its .py files, on a checkpoint in its layout.

    The code is executed on this machine, so the caller must name its folder. It needs transformers 4.41 to 4.49, timm
    and einops.
    """

    layout: Layout = "microsoft"
    attends_to_padding = True

    def __init__(self, folder: Path, code: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoProcessor

        self.name = f"remote code, transformers {importlib.metadata.version('transformers')}"
        self.dtype = dtype
        self._scratch = tempfile.TemporaryDirectory()
        joined = Path(self._scratch.name) / f"remote_{random.randrange(1 << 30)}"  # its modules are cached by name
        joined.mkdir()
        for file in [*folder.iterdir(), *code.glob("*.py")]:
            (joined / file.name).symlink_to(file.resolve())
        _add_code_references(joined)
        self.model = AutoModelForCausalLM.from_pretrained(joined, trust_remote_code=True, torch_dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(joined, trust_remote_code=True)

    def pixels(self, image: Image.Image) -> Tensor:
        values: Tensor = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return values

    def features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.model._encode_image(pixel_values.to(self.dtype))
        return features

    def encode(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        output = self._forward(pixel_values, ids, decoder_input_ids=torch.tensor([[2]]))
        encoded: Tensor = output.encoder_last_hidden_state
        return encoded

    def logits(self, pixel_values: Tensor, ids: Sequence[int], decoder_ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._forward(pixel_values, ids, decoder_input_ids=torch.tensor([decoder_ids])).logits
        return logits

    def loss(self, pixel_values: Tensor, ids: Sequence[int], labels: Sequence[int]) -> float:
        return float(self._forward(pixel_values, ids, labels=torch.tensor([labels])).loss)

    def batch_loss(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.all(), "this code attends to padding"
        output = self.model(input_ids=input_ids, pixel_values=pixel_values.to(self.dtype), labels=labels)
        loss: Tensor = output.loss
        return loss

    def generate(
        self, pixel_values: Tensor, ids: Sequence[int], options: GenerationOptions
    ) -> tuple[list[list[int]], list[list[float]], list[float] | None]:
        self.model.language_model.generation_config = _generation_config(options)
        output = self.model.generate(input_ids=torch.tensor([ids]), pixel_values=pixel_values.to(self.dtype))
        return _unpack(self.model.language_model, output)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(text)["input_ids"]
        return ids

    def detokenize(self, ids: Sequence[int], skip_special: bool) -> str:
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=skip_special)
        return text

    def sentence(self, prompt: str) -> str:
        sentence: str = self.processor._construct_prompts([prompt])[0]
        return sentence

    def answer(self, task: str, text: str, size: tuple[int, int]) -> dict[str, Any]:
        """Return its parsed answer of a generated text."""
        answer: dict[str, Any] = self.processor.post_process_generation(text=text, task=task, image_size=size)
        return answer

    def scored_answer(
        self, task: str, ids: Sequence[int], logprobs: Sequence[float], size: tuple[int, int]
    ) -> dict[str, Any]:
        """Return its parsed answer of generated ids and their log-probabilities."""
        answer: dict[str, Any] = self.processor.post_process_generation(
            sequence=torch.tensor(ids), transition_beam_score=torch.tensor(logprobs), task=task, image_size=size
        )
        return answer

    def pixels_to_bins(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the bins of boxes (N, 4) in pixels."""
        bins: Tensor = self.processor.post_processor.box_quantizer.quantize(boxes, size)
        return bins

    def _forward(self, pixel_values: Tensor, ids: Sequence[int], **others: Any) -> Any:
        return self.model(input_ids=torch.tensor([ids]), pixel_values=pixel_values.to(self.dtype), **others)


def _convert(folder: Path, scratch: Path) -> Path:
    """Convert the checkpoint to the native layout, without its final_logits_bias."""
    from florence2.checkpoints.checkpoint import copy_companions, load_model, save_checkpoint, save_tokenizer
    from florence2.checkpoints.describe import stored_dtype
    from florence2.checkpoints.tensors import find_weights
    from florence2.inputs.tokenizer import FlorenceTokenizer

    model = load_model(folder, dtype=stored_dtype(find_weights(folder)))
    model.final_logits_bias.zero_()
    save_checkpoint(model, scratch / "native", "native")
    copy_companions(folder, scratch / "native")
    tokenizer = FlorenceTokenizer(folder / "tokenizer.json")
    save_tokenizer(tokenizer, scratch / "native", "native", model.config)
    return scratch / "native"


def _add_code_references(folder: Path) -> None:
    """Name the code in config.json and preprocessor_config.json, as the published checkpoints do."""
    import json

    references = {
        "config.json": {
            "AutoConfig": "configuration_florence2.Florence2Config",
            "AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration",
        },
        "preprocessor_config.json": {"AutoProcessor": "processing_florence2.Florence2Processor"},
    }
    for name, auto_map in references.items():
        values = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        if name == "preprocessor_config.json":
            values.setdefault("image_seq_length", 577)
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(values))


def _generation_config(options: GenerationOptions) -> Any:
    """Set every setting explicitly, so that no default of either side matters."""
    from transformers import GenerationConfig

    return GenerationConfig(
        **{name: getattr(options, name) for name in GENERATION_SETTINGS},
        do_sample=False,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        return_dict_in_generate=True,
        output_scores=True,
    )


def _unpack(model: Any, output: Any) -> tuple[list[list[int]], list[list[float]], list[float] | None]:
    beams = getattr(output, "beam_indices", None)
    transitions = model.compute_transition_scores(
        output.sequences, output.scores, beams, normalize_logits=beams is None
    )
    scores = getattr(output, "sequences_scores", None)
    return output.sequences.tolist(), transitions.tolist(), None if scores is None else scores.tolist()
