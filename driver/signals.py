"""The signals that stop a run, for the time in which no run can write a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from video_opd.cluster.join import kill_own_ray
from video_opd.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_STOP_S = 2.0  # `timeout` and others signal a process, then its group


def signals_to_handle() -> list[signal.Signals]:
    """Those of SIGNALS that are not ignored (as by nohup); none outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [which for which in SIGNALS if signal.getsignal(which) != signal.SIG_IGN]


def signalled_again(which: signal.Signals, first_s: float) -> None:
    """A further signal: within SAME_STOP_S of the first, the same stop; later the end, at once."""
    if time.monotonic() - first_s >= SAME_STOP_S:
        kill_own_ray()
        signal.signal(which, signal.SIG_DFL)
        os.kill(os.getpid(), which)


@contextmanager
def stopped_by_signals(text: str) -> Iterator[SimpleNamespace]:
    """SIGTERM and SIGINT end the block with StoppedError: "stopped by SIGTERM" and the text it has then."""
    said, stopped_by, first_s = SimpleNamespace(text=text), signal.SIGINT, 0.0

    def stop(number: int, _: object) -> None:
        nonlocal stopped_by, first_s
        if first_s:
            return signalled_again(signal.Signals(number), first_s)
        stopped_by, first_s = signal.Signals(number), time.monotonic()
        raise KeyboardInterrupt  # which no `except Exception` takes for an error of its own

    before = {which: signal.signal(which, stop) for which in signals_to_handle()}
    try:
        yield said
    except KeyboardInterrupt:
        raise StoppedError(f"stopped by {stopped_by.name}{said.text}", stopped_by) from None
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
