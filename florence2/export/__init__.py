"""A model goes in, a folder of ONNX graphs comes out that other runtimes run.

`command` puts it together. `graphs` traces the parts of the model, `merge` joins the decoder's two uses into one graph,
`storage` writes weights, `sidecars` the settings next to them, and `prove` compares everything with torch in the end.
"""
