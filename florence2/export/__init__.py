"""A model goes in, a folder of ONNX graphs comes out that other runtimes run.

`command` puts it together. `graphs` has the parts of the model as graphs, `sidecars` writes the settings next to them,
and `prove` compares everything with torch in the end.
"""
