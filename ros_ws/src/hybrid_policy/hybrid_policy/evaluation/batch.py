"""Many bags: one after another, in a pool of processes, or as Ray tasks. Results come as they finish."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from hybrid_policy.errors import InputError
from hybrid_policy.evaluation.bag_job import BagJob, Tell, run_job

#: (index of the job, its result)
Done = tuple[int, dict[str, Any]]


def run_here(jobs: Sequence[BagJob], tell: Tell) -> Iterator[Done]:
    """In this process, in order."""
    for i, job in enumerate(jobs):

        def told(fraction: float, text: str, at: int = i) -> None:
            tell((at + fraction) / len(jobs), f"{jobs[at].name}: {text}")

        yield i, _guarded(job, told)


def run_pool(jobs: Sequence[BagJob], workers: int) -> Iterator[Done]:
    """In ``workers`` processes; each keeps the engines it has loaded."""
    # spawn: a forked child of a process that used CUDA or threads cannot use them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_guarded, job): i for i, job in enumerate(jobs)}
        for future in as_completed(waiting):
            i = waiting[future]
            try:
                yield i, future.result()
            except Exception as error:  # a worker that was killed takes its bag along, not the others
                yield i, _lost(jobs[i], error)


def run_ray(jobs: Sequence[BagJob], gpus: float = 0.0) -> Iterator[Done]:
    """As Ray tasks, on the cluster that RAY_ADDRESS names or on this machine.

    Bags, checkpoint and output must lie where every node sees them under the same path.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray: Ray is not installed; pip install 'hybrid_policy[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=1)(_guarded)
    waiting = {task.remote(job): i for i, job in enumerate(jobs)}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        i = waiting.pop(ready)
        try:
            yield i, ray.get(ready)
        except ray.exceptions.RayError as error:
            yield i, _lost(jobs[i], error)


def _guarded(job: BagJob, tell: Tell = lambda _fraction, _text: None) -> dict[str, Any]:
    """The job; a fault of ours in one bag must not lose the others."""
    try:
        return run_job(job, tell)
    except InputError:
        raise
    except Exception as error:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "error.txt").write_text(traceback.format_exc(), "utf-8")
        return _lost(job, error)


def _lost(job: BagJob, error: BaseException) -> dict[str, Any]:
    first = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {first[0] if first else ''}"
    found: dict[str, Any] = {"name": job.name, "bag": str(job.bag), "status": "failed", "seconds": 0.0}
    return found | {"lacks": [text], "notes": [], "problems": [], "inputs": [], "topics": []}
