"""What a CUDA device computes in another way: recorded steps, fused kernels, prepared weights, images on the device.

Each part names the plain code that it stands in for, and the plain code runs wherever a part cannot be used.
"""
