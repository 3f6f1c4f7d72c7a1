"""Serve Florence-2 on a Ray cluster: `pip install "ray[serve]"`, then `python -m docs.ray_serve`.

Each replica is the whole server of `florence2 serve`, with its own queue and cache; Ray shares the requests out
among them, and starts one again that has died.
"""

import os

from fastapi import FastAPI
from ray import serve

import florence2
from florence2.serve.app import create_app
from florence2.serve.settings import Settings

MODEL, DEVICE = os.environ.get("FLORENCE2_MODEL", "base"), os.environ.get("FLORENCE2_DEVICE", "auto")
KEYS = tuple(key for key in os.environ.get("FLORENCE2_API_KEYS", "").split(",") if key)
GPUS = float(os.environ.get("FLORENCE2_GPUS", "1"))  # of each replica; 0 on a CPU
REPLICAS = int(os.environ.get("FLORENCE2_REPLICAS", "1"))


def make_app() -> FastAPI:
    """Return the server of one replica with its model, which Ray waits for before it sends requests."""
    model = florence2.load(MODEL, device=DEVICE)
    return create_app(model, Settings(names=(MODEL,), keys=KEYS, local=not KEYS))  # others than this machine need a key


class Replica:
    """The server of one replica."""


deployment = serve.deployment(
    num_replicas=REPLICAS,
    ray_actor_options={"num_gpus": GPUS},
    max_ongoing_requests=64,  # of a replica: what it can batch; its own queue holds no more
    max_queued_requests=256,  # of the cluster: further ones get 503
    graceful_shutdown_timeout_s=40,
)
app = deployment(serve.ingress(make_app)(Replica)).bind()

if __name__ == "__main__":
    serve.run(app, blocking=True)
