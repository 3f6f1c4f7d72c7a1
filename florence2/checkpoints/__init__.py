"""Files on disk to a model and back: both layouts of tensor names, strict loading, adapters, the Hugging Face Hub.

Begin with `checkpoint`; `layouts` has the names, `hub` is the only module that touches the network.
"""
