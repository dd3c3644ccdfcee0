"""Simulators in parallel processes: frames of the expert, and episodes of a policy that infers in batches."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from collect import SCENES, Frames, Recorder, collect
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.evaluation.closed_loop import Asked as Observed
from hybrid_policy.evaluation.closed_loop import Episode, EpisodeResult, LoopSettings
from hybrid_policy.models.images import resize_with_pad
from hybrid_policy.models.observation import ActionChunk, PolicySpec
from hybrid_policy.share import share_path
from hybrid_policy.sim.rendering import choose_gl
from hybrid_policy.sim.robot import SimRobot
from hybrid_policy.sim.tasks import TASK_COLOURS, SceneSettings, sample_scene
from numpy.typing import NDArray

#: Delays (s) that a policy meets while it collects its own frames.
DELAYS = (0.0, 0.1, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Asked:
    """One observation for the batch. images: uint8 [cameras, S, S, 3]; noise: float32 [H, actions]."""

    images: NDArray[np.uint8]
    state: NDArray[np.float32]
    prompt: str
    noise: NDArray[np.float32]


#: Observations -> the chunks' actions float32 [n, H, action_dim] (the checkpoint's units).
BatchPolicy = Callable[[list[Asked]], NDArray[np.float32]]


@dataclass(frozen=True)
class EpisodesJob:
    """Episodes of scenes ``seeds``, ``at_once`` of them interleaved; ``label`` also gives their frames."""

    seeds: tuple[int, ...]
    spec: PolicySpec
    scenes: SceneSettings
    settings: LoopSettings
    size: int
    at_once: int = 3
    label: bool = False


def _collect(job: tuple[int, int, int, int, float]) -> Frames:
    return collect(*job)


def _episode(job: EpisodesJob, robot: SimRobot, robot_file: RobotFile, seed: int) -> Episode:
    random = np.random.default_rng(seed)
    scene = sample_scene(random, job.scenes)
    settings = job.settings
    if job.label:
        delay, age = float(random.choice(DELAYS)), float(random.uniform(0.0, 0.05))
        settings = replace(settings, delay=delay, image_age=age)
    return Episode(robot, scene, robot_file, job.spec, settings=settings, seed=seed)


def _as_asked(job: EpisodesJob, seen: Observed) -> Asked:
    observation, noise, _ = seen
    images = [resize_with_pad(observation.images[name], job.size, job.size) for name in job.spec.cameras]
    return Asked(np.stack(images), observation.state, observation.prompt, noise)


def _switched(episode: Episode, switches: dict[int, int], place: int) -> bool:
    """Most episodes go on: hold for a moment, then the other cube; at most two such changes."""
    count = switches.get(place, 0)
    random = np.random.default_rng((episode.seed, count))
    if count >= 4 or (count % 2 == 0 and (not episode.result.success or random.random() < 0.35)):
        return False
    switches[place] = count + 1
    if count % 2 == 0:
        episode.ask(episode.prompt, episode.target, float(random.uniform(0.05, 2.0)), stop_at_success=False)
    else:
        other = TASK_COLOURS[1 - TASK_COLOURS.index(episode.target)]
        episode.ask(episode.prompt.replace(episode.target, other), other, episode.settings.limit)
    return True


def _episodes(job: EpisodesJob, pipe: Connection) -> None:
    """Run a job's episodes; send a list of Asked, receive chunks; at last send results and frames."""
    robot_file = RobotFile.load(share_path("config/robots/sim_aloha.yaml"))
    recorder = Recorder(robot_file, job.size, job.spec.horizon)
    waiting = list(job.seeds)
    results: list[EpisodeResult] = []
    first = sample_scene(np.random.default_rng(0), job.scenes)
    robots = [SimRobot(first) for _ in range(min(job.at_once, len(waiting)))]
    running: list[Episode | None] = [_episode(job, robot, robot_file, waiting.pop(0)) for robot in robots]
    switches: dict[int, int] = {}  # place -> prompts since the first
    while True:
        asked: list[tuple[int, Asked]] = []
        for place, robot in enumerate(robots):
            while (episode := running[place]) is not None:
                seen = episode.observe()
                if seen is not None:
                    asked.append((place, _as_asked(job, seen)))
                    if job.label:
                        recorder.add(robot, asked[-1][1].images)
                    break
                if place not in switches:
                    results.append(episode.result)
                if job.label and _switched(episode, switches, place):
                    continue
                switches.pop(place, None)
                running[place] = _episode(job, robot, robot_file, waiting.pop(0)) if waiting else None
        if not asked:
            break
        pipe.send([item for _, item in asked])
        chunks = pipe.recv()
        for (place, _), actions in zip(asked, chunks):
            episode = running[place]
            assert episode is not None
            stamp = episode.robot.time_ns
            episode.act(ActionChunk(actions, actions, stamp, {}))
    for robot in robots:
        robot.close()
    pipe.send((results, recorder.frames() if job.label and len(recorder) else None))


def _serve(pipe: Connection) -> None:
    """A worker: jobs in, results out, until None."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    while (job := pipe.recv()) is not None:
        if isinstance(job, EpisodesJob):
            _episodes(job, pipe)
        else:
            pipe.send(_collect(job))


class Pool:
    """``count`` simulator processes."""

    def __init__(self, count: int) -> None:
        choose_gl()
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._outstanding: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._pipes)

    def start_collecting(self, seed: int, part: int, size: int, horizon: int, rest_share: float) -> None:
        """Every worker collects ``part`` frames, again and again, until ``collected`` has enough."""
        self._job = (part, size, horizon, rest_share)
        self._seed = seed
        for pipe in self._pipes:
            self._submit(pipe)

    def _submit(self, pipe: Connection) -> None:
        pipe.send((self._seed, *self._job))
        self._seed += 1
        self._outstanding.add(pipe)

    def collected(self, seconds: float, frames: int) -> Iterator[Frames]:
        """Parts as they come, for ``seconds`` or until there are ``frames``; then those under way.

        Take them in a thread while something else is computed: a worker waits until its part is taken.
        """
        end, count = time.monotonic() + seconds, 0
        while self._outstanding:
            for pipe in wait(list(self._outstanding)):
                assert isinstance(pipe, Connection)
                part = pipe.recv()
                self._outstanding.discard(pipe)
                count += len(part)
                if time.monotonic() < end and count < frames:
                    self._submit(pipe)
                yield part

    def episodes(self, job: EpisodesJob, policy: BatchPolicy) -> tuple[list[EpisodeResult], Frames | None]:
        """All of a job's episodes, spread over the workers, with batched inference here."""
        busy = self._pipes[: len(job.seeds)]
        for index, pipe in enumerate(busy):
            pipe.send(replace(job, seeds=job.seeds[index :: len(busy)]))
        live, results, frames = set(busy), [], []
        while live:
            asked: list[tuple[Connection, list[Asked]]] = []
            for pipe in list(live):  # in lockstep: one batch a round
                message = pipe.recv()
                if isinstance(message, tuple):
                    live.discard(pipe)
                    results += message[0]
                    frames += [message[1]] if message[1] is not None else []
                else:
                    asked.append((pipe, message))
            if asked:
                chunks = policy([item for _, items in asked for item in items])
                at = 0
                for pipe, items in asked:
                    pipe.send(chunks[at : at + len(items)])
                    at += len(items)
        results.sort(key=lambda result: result.seed)
        return results, Frames.joined(frames) if frames else None

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=10)


__all__ = ["DELAYS", "SCENES", "Asked", "BatchPolicy", "EpisodesJob", "Pool"]
