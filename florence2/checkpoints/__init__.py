"""From files to a model and back: both layouts of tensor names, strict loading, adapters, the Hugging Face Hub.

Begin with `checkpoint`. `layouts` has the rules of the names; `checks` makes loading and saving strict; `hub` is the
only module that uses the network.
"""
