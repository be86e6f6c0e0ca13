"""A loader whose workers outlive a SIGTERM to the whole group of processes: that is for the one that saves."""

import os
import signal
import threading
from functools import partial
from typing import Any

from torch.utils.data import DataLoader


class Loader(DataLoader):
    """torch's; the server that forks the workers outlives a SIGTERM too."""

    def __iter__(self) -> Any:
        self.worker_init_fn = partial(_heed, os.getpid())
        # A mask is inherited: a handler that a worker sets would come too late for one that is starting.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed(main: int, worker: int) -> None:
    """Let a SIGTERM of the process `main` alone end this worker: so torch ends one that is stuck."""
    threading.Thread(target=_wait_for_sigterm, args=(main,), daemon=True).start()


def _wait_for_sigterm(main: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)
