"""Images, prompts and steps recorded once as CUDA graphs, over buffers that never move, and then replayed.

`graphs` records and keeps recordings, `slots` and `lane` are the steps of running answers, `stages` images and prompts.
"""
