"""An iterator that runs ahead in a thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(iterator: Iterator[T], *, size: int = 2) -> Generator[T, None, None]:
    """Run an iterator in a thread, up to `size` items ahead.

    The thread starts with the first item asked for. Its exceptions are raised again
    here, with their traceback; closing the generator ends it and closes `iterator`.

    Raises:
        ValueError: where `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"size: found {size}, expected at least 1")
    return _prefetch(iterator, size=size)


def _prefetch(iterator: Iterator[T], *, size: int) -> Generator[T, None, None]:
    items: queue.Queue = queue.Queue(size)
    stop = threading.Event()
    end = object()

    def produce() -> None:
        error = None
        try:
            for item in iterator:
                items.put((item, None))
                if stop.is_set():
                    break
            close = getattr(iterator, "close", None)
            if close:
                close()
        except BaseException as raised:  # handed to the consumer, who raises it
            error = raised
        if not stop.is_set():
            items.put((end, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            # Free the place that the thread may be waiting for.
            while not items.empty():
                items.get()
            thread.join(timeout=0.05)
