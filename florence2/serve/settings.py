"""The settings of a server: its limits, its keys, and who may call it."""

from dataclasses import dataclass

from florence2.errors import OptionError

MIB = 1 << 20
PIXELS = 64_000_000  # 192 MB as RGB
BODY_MIB, QUEUE_MIB, CACHE_MIB = 20, 256, 512
QUEUE_LENGTH = 256
DEADLINE, DRAIN = 120.0, 30.0  # seconds
_LEAST = {
    "max_queue": 1,
    "queue_bytes": 1,
    "cache_bytes": 0,
    "deadline": 0.001,
    "drain": 0,
    "max_body_bytes": 1,
    "max_pixels": 1,
}


@dataclass(frozen=True)
class Settings:
    """What a server allows, and to whom.

    Attributes:
        names: What the model is called, its id first; any of them may stand in a request's `model`.
        max_batch: How many answers are computed at once; None is 8 on a CPU and 64 elsewhere.
        cache_bytes: How many bytes of encoded images are kept for later requests.
        max_queue: How many requests may wait.
        queue_bytes: How many bytes their images may take, and how many bodies that are being read.
        deadline: Seconds after which a request is given up.
        drain: Seconds that accepted requests get after the signal to stop.
        max_body_bytes: The longest body of a request, and the longest image of a URL.
        max_pixels: The most pixels of an image.
        keys: A client must send one of them; without keys everyone is let in.
        local: Whether the `Host` of a request must name this machine, so that a web page cannot reach the server
            under a name of its own (DNS rebinding).
        origins: Web pages of other hosts that may call the server, such as "https://app.example.com".
        url_hosts: Hosts from which images are fetched; none switches URLs off.
        url_http: Whether they may be fetched without encryption.
        log_answers: Whether the log contains prompts and answers.
        vllm_metrics: Whether metrics are also reported under vLLM's names.
    """

    names: tuple[str, ...] = ("florence2",)
    max_batch: int | None = None
    cache_bytes: int = CACHE_MIB * MIB
    max_queue: int = QUEUE_LENGTH
    queue_bytes: int = QUEUE_MIB * MIB
    deadline: float = DEADLINE
    drain: float = DRAIN
    max_body_bytes: int = BODY_MIB * MIB
    max_pixels: int = PIXELS
    keys: tuple[str, ...] = ()
    local: bool = True
    origins: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    url_http: bool = False
    log_answers: bool = False
    vllm_metrics: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.max_batch is not None and self.max_batch < 1:
            raise OptionError(f"max_batch is {self.max_batch}; it must be at least 1.")
        if not self.names:
            raise OptionError("names is empty; give the model at least one name.")
