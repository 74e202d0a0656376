"""Program that tests run under torchrun. Arguments: a folder to write to, and the rank that is to fail at the first
start."""

import os
import sys
import time
from pathlib import Path

from generative_recommenders.distributed import heartbeat
from generative_recommenders.distributed.launch import launch
from generative_recommenders.distributed.process_group import process_collectives


def work(rank: int, world_size: int, folder: str, failing: int) -> int:
    group = process_collectives("cpu")
    (Path(folder) / str(rank)).write_text(str(group.sum_scalar(rank + 1)))
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted:
        time.sleep(2)  # longer than a process has that believes a peer failed
    elif failing >= 0:
        if rank == failing:
            raise ValueError("the fault of this rank")
        time.sleep(600)
    return 0


if __name__ == "__main__":
    heartbeat.POLL_SECONDS, heartbeat.GRACE_SECONDS = 0.1, 0.1
    sys.exit(launch(work, (sys.argv[1], int(sys.argv[2])), device_type="cpu"))
