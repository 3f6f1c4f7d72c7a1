"""Serve one model to many clients: OpenAI's chat route, a typed route, and a page to try it.

HTTP requests come in through `http/`, become jobs that wait in `work/` for the one thread that owns the engine, and go
out as answers. Begin with `app.create_app`; `command` is `florence2 serve`.
"""
