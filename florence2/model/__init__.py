"""The network: pixel values and prompt ids go in, logits come out.

Compare it with the papers line by line: `davit` (the image encoder), `projection`, `bart` (text encoder and decoder)
with its `cache` of keys and values, joined in `florence2`. Code that is faster on one kind of processor is in
`florence2.fast`.
"""
