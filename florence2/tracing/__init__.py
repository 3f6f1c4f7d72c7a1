"""Watch or change what a run computes, by name: `f.trace(...)` keeps values, `f.patched({...})` replaces them.

Begin with `names`, the list of everything that can be named; then `recording` and `patches`.
"""
