"""Turn generated text into a typed answer: labels, boxes, quads and polygons in pixels, with scores.

Nothing here imports torch. Begin with `answer`; `parsing` finds the regions in the text, `confidence` rates them,
`reference` reproduces the reference's dict, `drawing` and `notebook` show them.
"""
