"""Several processes, one result: batches are shared out, their answers come back in order, files are written once.

Started by `accelerate launch`, every process runs the same command. A whole batch is one process's work, so that the
answers do not depend on the number of processes. In a single process all of this is a plain loop.
"""

import os
from datetime import timedelta

PATIENCE = timedelta(hours=12)  # how long a process waits for a slower one; a dead one ends all at once


def rank() -> int:
    """Return the number of this process, from 0; process 0 writes the files and speaks."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """Return how many processes run this command together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start() -> None:
    """Join the other processes, over NCCL where there is CUDA, else over gloo; nothing to do in a single process."""
    if size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def wait() -> None:
    """Return when every process has come here."""
    if size() > 1:
        start()
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def leave() -> None:
    """Take leave of the other processes, when all are done: one that just ends can make another one crash."""
    if size() > 1:
        wait()
        from accelerate import PartialState

        PartialState().destroy_process_group()


def agree(value):
    """Return process 0's value in every process."""
    if size() == 1:
        return value
    start()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gather(rows: list) -> list:
    """Return the rows of all processes, those of process 0 first, in every process."""
    if size() == 1:
        return rows
    start()
    from accelerate.utils import gather_object

    return gather_object(rows)


def each_batch(work, count: int, batch_size: int, label: str = "") -> list:
    """Return the rows that `work(start, stop)` gives for each batch of `count` items, in the items' order.

    Processes take batches in turn, and each gets all rows. A `label` shows a progress bar.
    """
    starts = range(0, count, batch_size)[rank() :: size()]
    if label and rank() == 0:
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc=label, unit="batch")
    own = [(at, work(at, min(at + batch_size, count))) for at in starts]
    return [row for _, rows in sorted(gather(own), key=lambda pair: pair[0]) for row in rows]


def batch_share(batch: int, device_batch: int = 0, group: int = 0) -> dict:
    """Return a trainer's settings under which all processes together learn from `batch` samples a step.

    `device_batch`: how many of them a device may hold at once (0: all of its share); the rest is accumulated. `group`:
    for GRPO, the rollouts of one prompt, which are generated together: as few groups at once as these batches allow.
    ValueError when the processes cannot share the batch equally.
    """
    own, remainder = divmod(batch, size())
    if remainder or not own:
        raise ValueError(
            f"A batch of {batch} cannot be shared equally by {size()} processes; launch a number of them "
            f"that divides {batch}."
        )
    most = min(device_batch or own, own)
    held = max(n for n in range(1, most + 1) if own % n == 0)
    settings = {"per_device_train_batch_size": held, "gradient_accumulation_steps": own // held}
    if group:
        times = range(1, own // held + 1)
        whole = (n for n in times if own // held % n == 0 and held * n * size() % group == 0)
        settings["steps_per_generation"] = next(whole)
    return settings


def one_card(config):
    """Return a trainer's configuration that uses one card for each process, however many this process could see."""
    if config.n_gpu > 1:
        config._n_gpu = 1  # else the trainer would copy the student to every card, which TRL refuses
    return config
