"""Workers and signals; that a run saves on a SIGTERM to the group is in test_run."""

import signal
import subprocess
import time

from torch.utils.data import Dataset

from deit_fast.train.loader import Loader


class Stuck(Dataset):
    """Its first sample is there at once, its second never."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(1000 * index)
        return index


def test_sigterm_ends_a_worker_where_its_loader_sends_it_alone():
    batches = iter(Loader(Stuck(), num_workers=1))
    next(batches)
    [worker] = batches._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0 and signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
