"""The network: pixel values and prompt ids go in, logits come out.

Compare it with the papers line by line: `davit` (the image encoder), `projection`, `bart` (text encoder and decoder),
joined in `florence2`. It knows no device and no faster way to the same numbers; those are in `florence2.fast`.
"""
