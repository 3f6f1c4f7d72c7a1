"""Triton kernels, one a file, each next to the plain lines that it stands in for.

Tensors go in and come out; models are not known here. `availability` says where kernels can run. The other files import
Triton, which is optional, so they are imported where a kernel is about to run and not before.
"""
