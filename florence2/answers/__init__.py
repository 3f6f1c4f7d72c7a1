"""From generated text to a typed answer: labels, boxes, quads and polygons in pixels, with scores.

Never imports torch. Begin with `answer`; `parsing` finds the regions in the text, `drawing` draws them.
"""
