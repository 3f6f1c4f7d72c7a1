"""The names in an exported folder: its files, its graphs, their inputs and outputs.

The layout is that of transformers.js and of the ONNX files on the Hub. `florence2.export` writes it, `florence2.lite`
reads it. This file imports nothing but the standard library.
"""

from collections.abc import Iterator

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
EXPORT = "export.json"
"""How the folder was made: the source's hashes, versions, and the differences that the proof found."""

FOLDER = "onnx"
VISION, EMBED, ENCODER = "vision_encoder", "embed_tokens", "encoder_model"
MERGED = "decoder_model_merged"
"""Decodes the first ids, which computes the keys and values of the memory, and the later ones, which reuse them."""
FIRST, STEP = "decoder_model", "decoder_with_past_model"
"""The same in two graphs. The weights of STEP are bytes of MERGED's file."""
CROSS = "cross_kv"
"""The keys and values of the memory alone; its weights are bytes of MERGED's file too."""
PREPROCESS = "preprocess"

USE_CACHE = "use_cache_branch"
"""The input of MERGED that says whether the keys and values of the memory are given; bool (1,)."""

SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_int8", "uint8": "_uint8", "q8": "_quantized", "q4": "_q4"}
"""The ending of a graph's name, by the type in which it computes. Weights stored as float16 compute in float32, too."""
ONE_SCALE = ("int8", "uint8", "q8")
"""Types whose graphs round the values of a whole batch by one scale, so that its rows depend on each other."""
BATCH, SOURCE, TARGET, PAST = "batch_size", "encoder_sequence_length", "decoder_sequence_length", "past_sequence_length"
TOTAL = "total_sequence_length"
"""The names of dynamic dimensions. Clients fill in the batch by its name, and 0 for lengths that they do not know.

The keys and values of memories, and their mask, may have a smaller batch than the sequences: in STEP one that divides
theirs, each memory serving as many sequences in a row, the beams of a question; in MERGED a batch of 1.
"""


def graph_file(graph: str, kind: str = "float32") -> str:
    """Return the path of a graph in the folder, such as "onnx/vision_encoder.onnx"."""
    return f"{FOLDER}/{graph}{SUFFIXES[kind]}.onnx"


def cache_names(prefix: str, source: str, layers: int) -> Iterator[str]:
    """Yield the names of the keys and values of a decoder with `layers` layers.

    `prefix` is "past_key_values" for inputs and "present" for outputs; `source` is "decoder" for those of the answer
    so far and "encoder" for those of the memory.
    """
    for layer in range(layers):
        for value in ("key", "value"):
            yield f"{prefix}.{layer}.{source}.{value}"
