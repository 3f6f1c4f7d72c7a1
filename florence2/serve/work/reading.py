"""Reading the images of jobs: in threads of their own, a few ahead of the model, and within limits of pixels."""

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from florence2.asking.requests import PreparedImage
from florence2.errors import ImageError
from florence2.inputs.formats import open_lazily
from florence2.runner import Runner
from florence2.serve.work.jobs import HeldImage, Job

_MOST_THREADS = 4  # each may hold an image of the largest size


class ImageReader:
    """Threads that read the images of waiting jobs."""

    def __init__(self, runner: Runner, most_pixels: int, tell: Callable[[], None]):
        """Read for `runner` images of at most `most_pixels`; `tell` is called after each."""
        self._runner, self._most_pixels, self._tell = runner, most_pixels, tell
        threads = min(_MOST_THREADS, runner.choose_pixels().threads)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="florence2-read")

    def start(self, jobs: Iterable[Job]) -> None:
        """Begin to read the images of jobs that are neither read nor encoded."""
        for held in {id(job.image): job.image for job in jobs}.values():
            if held.encoded is None and held.reading is None:
                held.reading = self._threads.submit(self._read, held)
                held.reading.add_done_callback(lambda _: self._tell())

    def _read(self, held: HeldImage) -> PreparedImage:
        assert held.data is not None
        check_pixels(held.data, self._most_pixels)
        return self._runner.prepare_image(held.data)

    def stop(self) -> None:
        """Read no further image."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def check_pixels(data: bytes, most: int) -> None:
    """Raise ImageError for the bytes of an image with more pixels than `most`, by its header alone."""
    try:
        with open_lazily(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception:  # noqa: BLE001  whoever reads the image explains
        return
    if width * height > most:
        raise ImageError(
            f"The image has {width} x {height} pixels, more than the {most:,} pixels allowed here; make it "
            "smaller first."
        )
