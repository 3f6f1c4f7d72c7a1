"""What a request must pass: keys and origins, the size and time of its body, and where its image comes from.

Begin with `guard.Guard`, which every request passes first.
"""
