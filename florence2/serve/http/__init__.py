"""From checked requests to jobs, and from answers to HTTP responses.

Begin with `routes.make_router`, then `chat.answer_chat` for OpenAI's route and `native.answer_tasks` for the typed one.
"""
