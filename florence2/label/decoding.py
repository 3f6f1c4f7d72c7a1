"""Processes that read images for the model's process. One that dies or hangs costs one image, and is replaced."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from florence2.asking.requests import PreparedImage
from florence2.errors import ImageError, OptionError
from florence2.label.decoder import ReadSettings, serve
from florence2.label.processes import signals_blocked

MAX_DECODE_SECONDS = 60.0
"""How long the decoder of one image may take before it counts as hanging."""
_START_SECONDS = 120.0
_SPAWN = get_context("spawn")  # a copy of a process with threads may hang


class Decoders:
    """A number of processes that read images."""

    def __init__(self, count: int, reading: ReadSettings, room: int = 0, seconds: float = MAX_DECODE_SECONDS):
        """Reserve the shared memory; the processes start when they are first needed.

        Args:
            count: The number of processes.
            reading: How images are read.
            room: The bytes of one image that is returned in its own size; there is always room for the model's input.
            seconds: How long one image may take.

        Raises:
            OptionError: There is not enough shared memory.
        """
        self.count, self.room = count, room
        self._idle: SimpleQueue[_Decoder] = SimpleQueue()
        self._every: list[_Decoder] = []
        self._threads = ThreadPoolExecutor(count)  # each waits for one process
        try:
            for _ in range(count):
                self._every.append(_Decoder(reading, _reserve(reading, room), seconds))
                self._idle.put(self._every[-1])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, name: str, content: Path | bytes) -> "Future[PreparedImage]":
        """Let an image be read; `name` is what messages call it.

        The future raises an ImageError for an image that cannot be read, or whose decoder died or hung, and an
        OptionError where no process can be started.
        """
        return self._threads.submit(self._read, name, content)

    def close(self) -> None:
        """End the processes, also those that are at work, and give the shared memory back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._every:
            decoder.kill()
        self._threads.shutdown()
        for decoder in self._every:
            decoder.close()
        self._every.clear()

    def _read(self, name: str, content: Path | bytes) -> PreparedImage:
        decoder = self._idle.get()
        try:
            return decoder.read(name, content)
        finally:
            self._idle.put(decoder)


def _reserve(reading: ReadSettings, room: int) -> SharedMemory:
    """Return shared memory for the pixels of an image: less than `room` bytes where the system has less."""
    least = 3 * reading.config.height * reading.config.width
    while True:
        size = max(least, room)
        try:
            return _allocate(size)
        except OSError as error:
            if size == least:
                raise OptionError(
                    f"The system has too little shared memory for decode workers ({error.strerror}); give it more, "
                    "such as `docker run --shm-size 1g`, or read images in the process itself: --workers 0."
                ) from None
            room //= 4


def _allocate(size: int) -> SharedMemory:
    """Return shared memory that exists: writing to such as is only promised would end the process."""
    block = SharedMemory(create=True, size=size)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(block._fd, 0, size)  # type: ignore[attr-defined]
    except OSError:
        block.close()
        block.unlink()
        raise
    return block


class _Decoder:
    """One process, its pipe and its shared memory."""

    def __init__(self, reading: ReadSettings, block: SharedMemory, seconds: float):
        self._reading, self._block, self._seconds = reading, block, seconds
        self._process: BaseProcess | None = None

    def read(self, name: str, content: Path | bytes) -> PreparedImage:
        if self._process is None:
            self._start()
        try:
            self._jobs.send(content)
            if not self._jobs.poll(self._seconds):
                raise self._failure(name, f"the decoder took more than {self._seconds:g} s and was ended")
            reply = self._jobs.recv()
        except (EOFError, OSError):
            raise self._failure(name, "the decoder died") from None
        if isinstance(reply, str):
            raise ImageError(reply)
        size, shape = reply
        return PreparedImage(np.ndarray(shape, np.uint8, self._block.buf).copy(), size)

    def kill(self) -> None:
        """End the process, from any thread: the one that waits for it sees that it died."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ValueError):  # it is closed by now
                process.kill()

    def close(self) -> None:
        self._stop()
        self._block.close()
        self._block.unlink()

    def _start(self) -> None:
        self._jobs, other = _SPAWN.Pipe()
        process = _SPAWN.Process(target=serve, args=(other, self._block.name, self._reading), daemon=True)
        with signals_blocked():
            process.start()
        other.close()  # so that the pipe ends with the process
        self._process = process
        try:
            if self._jobs.poll(_START_SECONDS):
                self._jobs.recv()
                return
        except (EOFError, OSError):
            pass
        self._stop()
        raise OptionError(
            "No decode worker can be started; read images in the process itself (--workers 0), or start fewer workers."
        )

    def _failure(self, name: str, reason: str) -> ImageError:
        """Return the error of an image that cost the process."""
        self._stop()
        return ImageError(f"{name} cannot be read: {reason}.")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._jobs.close()
        self._process = None
