"""Watch or change what a run computes, by name: `f.trace(...)` keeps values, `f.patched({...})` replaces them.

Begin with `names`, which lists everything that can be named, then read `recording` and `patches`.
"""
