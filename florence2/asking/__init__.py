"""Questions about images, checked once, and answers read from what a model generated; no model is known here.

In go images in each of their forms, tasks and generated ids; out come checked requests and Answers. Begin with
`questions.Questions`, the methods that everything which answers has in common; a `Runtime` answers whole folders too.
"""
