"""Florence-2 in one file: an image and a task go in, a text and its boxes come out.

    python docs/florence2_minimal.py weights/nano "<OD>" docs/scene.png

The folder holds a checkpoint as it is published: config.json, model.safetensors, tokenizer.json and
preprocessor_config.json, under Microsoft's names or those of transformers. Read from top to bottom: the sections follow
the data, and loading comes last. The code is written for the eye: greedy search without a cache, one question at a
time, no checks. docs/how-it-works explains every section, and a test holds this file to the tokens of the package.

Sizes, as they stand at the end of lines:
    B  images           H, W  rows and columns of a grid     C  channels of a stage
    w  window side      G     heads, or groups of channels   d  C / G, or D / G
    N  image tokens     S     image and prompt tokens        T  answer tokens so far
    D  model width      V     vocabulary
"""

import json
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn


# ---- 1. Pixels ------------------------------------------------------------------------------------------------------
def to_pixels(image: Image.Image, settings: dict[str, Any]) -> Tensor:
    """Resize and normalise an RGB image of any size -> (1, 3, H, W)."""
    # Both sides become 768 pixels, whatever they were: the model has seen nothing else. Answers do not mind, because
    # they give coordinates in thousandths of the width and of the height.
    resized = image.resize((settings["size"]["width"], settings["size"]["height"]), Image.Resampling.BICUBIC)
    x = np.asarray(resized, np.float32) / 255  # (H, W, 3)
    # mean and deviation of the pixels of ImageNet, for red, green and blue
    x = (x - np.array(settings["image_mean"], np.float32)) / np.array(settings["image_std"], np.float32)
    return torch.from_numpy(x).permute(2, 0, 1)[None]  # (1, 3, H, W)


# ---- 2. Attention, the operation that all parts share ---------------------------------------------------------------
def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Let each query (..., T, d) average the values (..., S, d) by how well their keys match: softmax(q kᵀ / √d) v."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (..., T, S); unscaled, softmax would pick one key alone
    if causal:  # no token may look at those after it
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(dim=-1) @ v  # (..., T, d)


# ---- 3. DaViT, the vision tower -------------------------------------------------------------------------------------
class Conv(nn.Conv2d):
    """A convolution over a grid whose channels come last, as linear layers want them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H', W', C')


class WindowAttention(nn.Module):
    """Positions look at positions, each inside its window of w x w: detailed, and blind to everything outside."""

    def __init__(self, C: int, heads: int, window: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.heads, self.window = heads, window

    def forward(self, x: Tensor) -> Tensor:
        (_, H, W, C), G, w = x.shape, self.heads, self.window
        # zeros complete the last windows; they are not masked, and at 768 pixels there are none
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
        x = x.unfold(1, w, w).unfold(2, w, w).permute(0, 1, 2, 4, 5, 3)  # (B, rows, columns, w, w, C)
        qkv = self.qkv(x.reshape(-1, w * w, C)).view(-1, w * w, 3, G, C // G)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B·rows·columns, G, w², d) each
        out = self.proj(attend(q, k, v).transpose(1, 2).flatten(2)).view(x.shape)  # (B, rows, columns, w, w, C)
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]  # (B, H, W, C)


class ChannelAttention(nn.Module):
    """Channels look at channels of their group. A channel spans all positions, so here the whole image meets."""

    def __init__(self, C: int, groups: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        (B, H, W, C), G = x.shape, self.groups
        # The same attention, transposed: tokens are the d channels of a group, their features the H·W positions. There
        # are d x d scores, so the cost grows with the number of positions and not with its square.
        q, k, v = self.qkv(x).view(B, H * W, 3, G, C // G).permute(2, 0, 3, 4, 1)  # (B, G, d, H·W) each
        return self.proj(attend(q, k, v).flatten(1, 2).transpose(1, 2)).view_as(x)  # (B, H, W, C)


class Block(nn.Module):
    """What surrounds either attention: four branches, each added to x. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, C: int, attention: nn.Module):
        super().__init__()
        # groups=C: each channel by itself. These convolutions show a position where it is, so no block needs a table.
        self.conv1, self.conv2 = (Conv(C, C, 3, padding=1, groups=C) for _ in range(2))
        self.norm1, self.norm2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), attention
        self.ffn = nn.Sequential(OrderedDict(fc1=nn.Linear(C, 4 * C), gelu=nn.GELU(), fc2=nn.Linear(4 * C, C)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv1(x)
        x = x + self.attn(self.norm1(x))  # the branch is normalised, what it is added to never
        x = x + self.conv2(x)
        return x + self.ffn(self.norm2(x))


class DaViT(nn.Module):
    """Four stages of a strided convolution and pairs of blocks: (B, 3, H, W) -> (B, H / 32, W / 32, C)."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.convs, self.blocks = nn.ModuleList(), nn.ModuleList()
        dims = c.get("dim_embed") or c["embed_dim"]
        for i, (c_in, C) in enumerate(zip([3, *dims], dims, strict=False)):
            conv = Conv(c_in, C, c["patch_size"][i], c["patch_stride"][i], c["patch_padding"][i])
            # norm, then convolution; not in the first stage, because pixels are normalised already
            before, after = {"norm": nn.LayerNorm(c_in), "conv": conv}, {"conv": conv, "norm": nn.LayerNorm(C)}
            self.convs.append(nn.Sequential(OrderedDict(before if c["patch_prenorm"][i] else after)))
            pairs = nn.Sequential()
            for _ in range(c["depths"][i]):
                spatial = Block(C, WindowAttention(C, c["num_heads"][i], c["window_size"]))
                channel = Block(C, ChannelAttention(C, c["num_groups"][i]))
                pairs.append(nn.Sequential(OrderedDict(spatial_block=spatial, channel_block=channel)))
            self.blocks.append(pairs)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 2, 3, 1)  # (B, H, W, 3)
        for conv, blocks in zip(self.convs, self.blocks, strict=True):
            x = blocks(conv(x))
        return x


# ---- 4. Projection, from vision to language -------------------------------------------------------------------------
class Projection(nn.Module):
    """A grid becomes a sequence of the language model's width: (B, H, W, C) -> (B, N, D), N = 1 + H·W."""

    def __init__(self, C: int, D: int, size: int):
        super().__init__()
        self.column_embeddings, self.row_embeddings = nn.Embedding(size, C // 2), nn.Embedding(size, C // 2)
        self.image_projection, self.image_proj_norm = nn.Linear(C, D, bias=False), nn.LayerNorm(D)

    def forward(self, grid: Tensor) -> Tensor:
        _, H, W, C = grid.shape
        # a sequence has no rows and columns, so each position carries its own: half of the channels for either
        columns = self.column_embeddings.weight[:W].expand(H, W, -1)
        rows = self.row_embeddings.weight[:H, None].expand(H, W, -1)
        # the model was laid out for videos: an image is frame 0 of a table of sines and cosines, 0, 1, 0, 1, ...
        frame = torch.tensor([0.0, 1.0]).repeat(C // 2)
        x = (grid + torch.cat([columns, rows], dim=-1) + frame).flatten(1, 2)  # (B, H·W, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, N, C): the mean of all positions comes first
        return self.image_proj_norm(self.image_projection(x))  # (B, N, D)


# ---- 5. BART, which reads image and prompt and writes the answer ----------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention from x to a source, which is x itself or the memory: (B, T, D), (B, S, D) -> (B, T, D)."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, source: Tensor, causal: bool = False) -> Tensor:
        projected = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        q, k, v = (y.view(*y.shape[:2], self.heads, -1).transpose(1, 2) for y in projected)  # (B, G, T or S, d)
        return self.out_proj(attend(q, k, v, causal).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer of the encoder or, with `cross`, of the decoder: (B, T, D) -> (B, T, D)."""

    def __init__(self, D: int, heads: int, hidden: int, cross: bool):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = Attention(D, heads), nn.LayerNorm(D)
        if cross:
            self.encoder_attn, self.encoder_attn_layer_norm = Attention(D, heads), nn.LayerNorm(D)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(D, hidden), nn.Linear(hidden, D), nn.LayerNorm(D)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        # unlike in the tower, the sum is normalised: the order of the Transformer of 2017
        x = self.self_attn_layer_norm(x + self.self_attn(x, x, causal=memory is not None))
        if memory is not None:  # the only place where the answer sees the image and the prompt
            x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, memory))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class Stack(nn.Module):
    """The encoder or the decoder: embeddings (B, T, D) -> hidden states (B, T, D)."""

    def __init__(self, c: dict[str, Any], side: str):
        super().__init__()
        shape = c["d_model"], c[f"{side}_attention_heads"], c[f"{side}_ffn_dim"], side == "decoder"
        self.embed_positions = nn.Embedding(c["max_position_embeddings"] + 2, c["d_model"])
        self.layernorm_embedding = nn.LayerNorm(c["d_model"])
        self.layers = nn.ModuleList(Layer(*shape) for _ in range(c[f"{side}_layers"]))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        positions = self.embed_positions.weight[2:]  # rows 0 and 1 were meant for padding, and are never used
        x = self.layernorm_embedding(x + positions[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, memory)
        return x


class Florence2(nn.Module):
    """All of it: pixels and prompt ids -> logits of the next answer token."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        vision, text = c["vision_config"], c["text_config"]
        size = vision.get("max_position_embeddings") or vision["image_pos_embed"]["max_pos_embeddings"]
        C = (vision.get("dim_embed") or vision["embed_dim"])[-1]
        self.vision_tower, self.projection = DaViT(vision), Projection(C, text["d_model"], size)
        # one table reads the prompt, reads the answer, and writes the answer
        self.shared = nn.Embedding(text["vocab_size"], text["d_model"])
        self.encoder, self.decoder = Stack(text, "encoder"), Stack(text, "decoder")
        self.final_logits_bias = nn.Parameter(torch.zeros(1, text["vocab_size"]))

    def encode(self, pixels: Tensor, prompt: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) and prompt ids (B, S - N) -> memory (B, S, D)."""
        image = self.projection(self.vision_tower(pixels))  # (B, N, D)
        # to the encoder, image and prompt are one sequence: each word can look at each place, and the reverse
        return self.encoder(torch.cat([image, self.shared(prompt)], dim=1))

    def decode(self, answer: Tensor, memory: Tensor) -> Tensor:
        """Answer ids so far (B, T) -> logits (B, T, V) of the id after each of them."""
        return F.linear(self.decoder(self.shared(answer), memory), self.shared.weight, self.final_logits_bias[0])


# ---- 6. The search: logits become ids -------------------------------------------------------------------------------
BOS, END = 0, 2  # <s> and </s>; the decoder starts from END, as BART's was trained to


def repeats(ids: list[int], n: int) -> list[int]:
    """Return each id that would complete an n-gram that occurred before."""
    last = ids[len(ids) - n + 1 :]
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if n and ids[i : i + n - 1] == last]


def write(model: Florence2, memory: Tensor, n: int, limit: int) -> list[int]:
    """Append the likeliest id that repeats no n-gram, until that is the end or `limit` ids are written."""
    ids = [END]
    while len(ids) <= limit and (len(ids) == 1 or ids[-1] != END):
        logits = model.decode(torch.tensor([ids]), memory)[0, -1]  # (V,); without a cache all T are computed again
        logits[repeats(ids, n)] = float("-inf")
        # the first id is forced, and so is the last where the limit cuts
        ids.append(BOS if len(ids) == 1 else END if len(ids) == limit else int(logits.argmax()))
    return ids


# ---- 7. Prompt and answer: what ids mean ----------------------------------------------------------------------------
TASKS = {  # the model reads sentences, not task tokens; what it writes is a text, boxes, quads or polygons
    "<CAPTION>": ("What does the image describe?", "text"),
    "<DETAILED_CAPTION>": ("Describe in detail what is shown in the image.", "text"),
    "<MORE_DETAILED_CAPTION>": ("Describe with a paragraph what is shown in the image.", "text"),
    "<OCR>": ("What is the text in the image?", "text"),
    "<OCR_WITH_REGION>": ("What is the text in the image, with regions?", "quads"),
    "<OD>": ("Locate the objects with category name in the image.", "boxes"),
    "<DENSE_REGION_CAPTION>": ("Locate the objects in the image, with their descriptions.", "boxes"),
    "<REGION_PROPOSAL>": ("Locate the region proposals in the image.", "boxes"),
    "<CAPTION_TO_PHRASE_GROUNDING>": ("Locate the phrases in the caption: {}", "boxes"),
    "<OPEN_VOCABULARY_DETECTION>": ("Locate {} in the image.", "boxes"),
    "<REFERRING_EXPRESSION_SEGMENTATION>": ("Locate {} in the image with mask", "polygons"),
    "<REGION_TO_SEGMENTATION>": ("What is the polygon mask of region {}", "polygons"),
    "<REGION_TO_CATEGORY>": ("What is the region {}?", "text"),
    "<REGION_TO_DESCRIPTION>": ("What does the region {} describe?", "text"),
    "<REGION_TO_OCR>": ("What text is in the region {}?", "text"),
}
ADDED = [*"<od> </od> <ocr> </ocr>".split(), *(f"<loc_{bin}>" for bin in range(1000))]  # after BART's 50,265 tokens
ADDED += "<cap> </cap> <ncap> </ncap> <dcap> </dcap> <grounding> </grounding> <seg> </seg> <sep>".split()
ADDED += "<region_cap> </region_cap> <region_to_desciption> </region_to_desciption>".split()  # misspelt when published
ADDED += "<proposal> </proposal> <poly> </poly> <and>".split()
Shape = tuple[str, list[float]]  # a label, and x, y, x, y, ... in pixels


def find_shapes(kind: str, text: str, width: int, height: int) -> list[Shape]:
    """Read the shapes in "car<loc_52><loc_332><loc_932><loc_774>": for 640 x 480, [("car", [33.6, 159.6, ...])]."""
    shapes, kind = [], "polygons" if "<poly>" in text else kind  # open-vocabulary detection may answer with either
    for label, places in re.findall(r"([^<]*)((?:<loc_\d+>|<sep>|</?poly>)+)", text) if kind != "text" else ():
        for outline in re.split("<sep>|</?poly>", places):  # only polygons have these marks
            bins = [int(bin) for bin in re.findall(r"\d+", outline)]
            # a bin is a thousandth of the width (x) or height (y); it means its middle
            pixels = [(bin + 0.5) * (height if i % 2 else width) / 1000 for i, bin in enumerate(bins)]
            size = 4 if kind == "boxes" else 8 if kind == "quads" else len(pixels) or 1
            for cut in range(0, len(pixels) - size + 1, size):
                shapes.append((label.strip(), pixels[cut : cut + size]))
    return shapes


# ---- 8. From a folder to an answer ----------------------------------------------------------------------------------
NAMES = (  # turn the names of either layout into the paths of the modules above
    (r"^(model\.)?(language_model\.)?(model\.)?", ""),
    (r"^(lm_head|(en|de)coder\.embed_tokens)\.", "shared."),  # one table, stored under up to four names
    (r"^(multi_modal_projector\.)?(image_pos(ition)?_embed\.)?(?=image_|row_|column_)", "projection."),
    (r"image_projection$", "image_projection.weight"),
    (r"(convs\.\d+)\.proj\.", r"\1.conv."),
    (r"(window|channel)_attn\.", "attn."),
    (r"attn\.norm\.", "norm1."),
    (r"ffn\.norm\.", "norm2."),
    (r"\.fn(\.dw|\.net)?\.", "."),
)
Checkpoint = tuple[Florence2, Tokenizer, dict[str, Any]]  # the dict: settings of images and search


def load(folder: Path) -> Checkpoint:
    """Read a model and what comes with it."""
    config = json.loads((folder / "config.json").read_text())
    settings = {"no_repeat_ngram_size": 0, **config["text_config"]}
    for file in ("generation_config.json", "preprocessor_config.json"):
        settings |= json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    weights = {"final_logits_bias": torch.zeros(1, settings["vocab_size"])}  # one layout does not store it
    for stored, tensor in load_file(folder / "model.safetensors").items():
        name = stored
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        # float16 as stored; and Microsoft's code computes x @ image_projection, a linear layer x @ weightᵀ
        weights[name] = (tensor.T if stored == "image_projection" else tensor).float()
    with torch.device("meta"):  # shapes without values, which come from the file
        model = Florence2(config)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(ADDED)  # ids follow the order; tokens that the file has keep theirs
    return model, tokenizer, settings


@torch.no_grad()
def answer(checkpoint: Checkpoint, task: str, image: Image.Image) -> tuple[list[int], str, list[Shape]]:
    """Return ids, text and shapes. What follows a task's token, as in "<REGION_TO_OCR><loc_3>...", is its input."""
    model, tokenizer, settings = checkpoint
    name, _, task_input = task.partition(">")
    sentence, kind = TASKS[f"{name}>"]
    prompt = tokenizer.encode(sentence.format(task_input)).ids  # <s> ... </s>
    memory = model.encode(to_pixels(image, settings), torch.tensor([prompt]))
    ids = write(model, memory, settings["no_repeat_ngram_size"], limit=settings["max_position_embeddings"])
    text = re.sub("</?s>", "", tokenizer.decode(ids, skip_special_tokens=False))
    return ids, text, find_shapes(kind, text, *image.size)


if __name__ == "__main__":
    _, folder, task, file = sys.argv
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")  # cameras store how they were held
    ids, text, shapes = answer(load(Path(folder)), task, upright)
    print("\n".join(f"{label}: {' '.join(f'{x:.1f}' for x in pixels)}" for label, pixels in shapes) or text)
