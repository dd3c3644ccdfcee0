"""Keeps the newest messages, matches them by header stamp and watches over each input.

Receiving (:meth:`ObservationBuffer.receive_image` and the others) checks a message in microseconds and
stores it; :meth:`ObservationBuffer.snapshot` picks what belongs together; :meth:`observe` decodes. The
same class serves the node (each from its own thread) and a replay.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.control import ingest
from hybrid_policy.control.robot_file import Camera, RobotFile
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import Observation

JOINTS = "joints"
PROMPT = "prompt"
#: A stamp further back than this is a clock that was set back, not a message overtaken on its way.
REORDER_WINDOW = 500_000_000
#: rad (m): motion of any joint during which a live camera must show a difference.
FROZEN_MOTION = 0.05
_RATE_WINDOW = 2_000_000_000


@dataclass(frozen=True)
class InputStatus:
    """One input, as seen at one moment.

    age: seconds since the newest stamp; infinite before the first message. rate: per second, by the
    stamps of the last two seconds. drops: reason -> count. frozen: seconds of identical frames while
    the robot moved; 0 where it is not frozen.
    """

    name: str
    age: float
    rate: float
    expected_rate: float
    received: int
    drops: Mapping[str, int]
    frozen: float = 0.0
    stamp: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Messages that belong together. missing: inputs that have not come yet (then nothing else counts).

    images: camera name -> message; stamps: nanoseconds by camera name and "joints"; skew: seconds between
    the oldest and the newest of them; joints: float64 [joints].
    """

    images: Mapping[str, Any] = field(default_factory=dict)
    joints: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    stamps: Mapping[str, int] = field(default_factory=dict)
    skew: float = 0.0
    missing: tuple[str, ...] = ()


class _Input:
    """Counts and stamps of one input; the newest messages of it."""

    def __init__(self, name: str, expected_rate: float, keep: int) -> None:
        self.name, self.expected_rate = name, expected_rate
        self.messages: deque[tuple[int, Any]] = deque(maxlen=keep)
        self.received = 0
        self.drops: Counter[str] = Counter()
        self._stamps: deque[int] = deque(maxlen=1024)

    def admit(self, stamp: int) -> None:
        """Whether a message of this stamp may be stored; raises InputError where it must not."""
        if self.messages:
            newest = self.messages[-1][0]
            if stamp == newest:
                self.drops["duplicate stamp"] += 1
                raise InputError(f"{self.name}: header.stamp: {stamp} given twice, expected a later one")
            if newest - REORDER_WINDOW < stamp < newest:
                self.drops["out of order"] += 1
                late = (newest - stamp) * 1e-6
                raise InputError(f"{self.name}: header.stamp: {late:.1f} ms before the last, expected a later one")
            if stamp < newest:
                self.drops["stamp jumped back"] += 1
                self.messages.clear()
                self._stamps.clear()

    def store(self, stamp: int, message: Any) -> None:
        self.messages.append((stamp, message))
        self._stamps.append(stamp)
        while self._stamps[-1] - self._stamps[0] > _RATE_WINDOW:
            self._stamps.popleft()

    @property
    def newest(self) -> int:
        """The newest stamp; 0 before the first message."""
        return self.messages[-1][0] if self.messages else 0

    def rate(self, now: int) -> float:
        if len(self._stamps) < 2 or now - self._stamps[-1] > _RATE_WINDOW:
            return 0.0
        return (len(self._stamps) - 1) / ((self._stamps[-1] - self._stamps[0]) * 1e-9)

    def clear(self) -> None:
        self.messages.clear()
        self._stamps.clear()


@dataclass
class _Frozen:
    """Since when a camera has shown the same picture, where the robot was then, and how far it has been from there.

    The farthest, not where it is now: a robot that comes back, or stands because of this very fault, proves nothing.
    """

    digest: int
    since: int
    joints: NDArray[np.float64]
    moved: float = 0.0
    seconds: float = 0.0


class ObservationBuffer:
    """Synchronises a robot's inputs by header stamp. Thread-safe; time is passed in.

    cameras: those to wait for (the checkpoint's). joint_margin: share of a joint's range by which a
    reading may lie outside its limits; beyond it the reading is taken for a sensor fault.
    """

    def __init__(self, robot: RobotFile, cameras: Sequence[Camera], joint_margin: float = 0.5) -> None:
        self.robot = robot
        self._cameras = {camera.name: camera for camera in cameras}
        # As far back as an image may be old: a camera that is always late still finds its partners.
        reach = robot.timeouts.camera
        self._inputs = {c.name: _Input(c.name, c.rate, math.ceil(reach * c.rate) + 2) for c in cameras}
        kept = max(64, math.ceil(reach * robot.joint_states_rate) + 2)
        self._inputs[JOINTS] = _Input(JOINTS, robot.joint_states_rate, kept)
        self._prompt = robot.prompt
        self._prompt_drops: Counter[str] = Counter()
        self._oldest = 0
        self._frozen: dict[str, _Frozen] = {}
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._image_came: dict[str, int] = {}
        low = np.array([-np.inf if j.min is None else j.min for j in robot.joints])
        high = np.array([np.inf if j.max is None else j.max for j in robot.joints])
        margin = np.where(np.isfinite(high - low), joint_margin * (high - low), 0.0)
        self._low, self._high = low - margin, high + margin

    @property
    def prompt(self) -> str:
        """The prompt in force."""
        return self._prompt

    def set_prompt(self, text: str) -> None:
        """Use another prompt from the next observation on."""
        self._prompt = text

    def receive_image(self, name: str, message: Any) -> None:
        """Check and store an image of the camera ``name``.

        Raises:
            InputError: it was dropped (and counted), and why.
        """
        self._receive(name, message, lambda: ingest.check_image(message, self._cameras[name]))
        with self._lock:
            self._image_came[name] = time.monotonic_ns()
            self._arrival.notify_all()

    @property
    def camera_period(self) -> float:
        """Seconds between two images of the slowest camera; 0 without cameras."""
        return max((1.0 / camera.rate for camera in self._cameras.values()), default=0.0)

    def wait_for_images(self, used: Mapping[str, int], fresh: float, patience: float) -> bool:
        """Wait until every camera has sent another image.

        At once where every newest image is another than in ``used`` (nanoseconds by name, see
        :meth:`snapshot`) and the last of them came less than ``fresh`` seconds ago. False: not every
        camera sent one within ``patience`` seconds.
        """
        with self._lock:
            before = {name: self._inputs[name].newest for name in self._cameras}
            if all(stamp not in (0, used.get(name)) for name, stamp in before.items()):
                last = max(self._image_came.values(), default=0)
                if (time.monotonic_ns() - last) * 1e-9 < fresh:
                    return True
            return self._arrival.wait_for(
                lambda: all(self._inputs[name].newest != stamp for name, stamp in before.items()), patience
            )

    def receive_joints(self, message: Any) -> None:
        """Check and store a JointState. Raises InputError: it was dropped, and why."""

        def positions() -> NDArray[np.float64]:
            values = ingest.joint_positions(message, self.robot.joint_names)
            outside = (values < self._low) | (values > self._high)
            if outside.any():
                i = int(np.argmax(outside))
                raise InputError(
                    f"joint state: {self.robot.joint_names[i]}: {values[i]:g} given, expected a position "
                    f"from {self._low[i]:.4g} to {self._high[i]:.4g} (its limits and a margin)"
                )
            return values

        self._receive(JOINTS, message, positions)

    def receive_prompt(self, message: Any) -> None:
        """Check and store a prompt. Raises InputError: it was dropped, and why; the old one stays."""
        try:
            self._prompt = ingest.prompt_text(message)
        except InputError:
            self._prompt_drops["invalid"] += 1
            raise

    def _receive(self, name: str, message: Any, check: Any) -> None:
        with self._lock:
            source = self._inputs[name]
            source.received += 1
            try:
                stamp = ingest.stamp_ns(message)
                checked = check()
            except InputError as error:
                source.drops["invalid"] += 1
                raise (error if str(error).startswith((name, "joint")) else InputError(f"{name}: {error}")) from None
            if stamp < self._oldest:
                source.drops["before the reset"] += 1
                return  # it was on its way then: nothing to warn of
            source.admit(stamp)
            source.store(stamp, message if checked is None else checked)

    def snapshot(self) -> Snapshot:
        """What belongs together: of each input the message nearest to the newest moment that all reached.

        That moment is the smallest of the cameras' newest stamps; on a tie the later message is taken.
        """
        with self._lock:
            missing = tuple(name for name, source in self._inputs.items() if not source.messages)
            if missing:
                return Snapshot(missing=missing)
            moment = min((self._inputs[name].newest for name in self._cameras), default=self._inputs[JOINTS].newest)
            chosen = {
                name: min(reversed(source.messages), key=lambda item: abs(item[0] - moment))
                for name, source in self._inputs.items()
            }
        stamps = {name: stamp for name, (stamp, _) in chosen.items()}
        skew = (max(stamps.values()) - min(stamps.values())) * 1e-9
        images = {name: chosen[name][1] for name in self._cameras}
        return Snapshot(images, chosen[JOINTS][1], stamps, skew)

    def observe(self, snapshot: Snapshot) -> Observation:
        """Decode a complete snapshot.

        Raises:
            InputError: an image that looked right cannot be decoded (damaged JPEG); it is dropped.
        """
        images = {}
        for name, message in snapshot.images.items():
            try:
                images[name] = ingest.decode_image(message, self._cameras[name])
            except InputError:
                with self._lock:
                    source = self._inputs[name]
                    source.drops["damaged"] += 1
                    kept = [item for item in source.messages if item[1] is not message]
                    source.messages.clear()
                    source.messages.extend(kept)
                raise
            self._watch_frozen(name, images[name], snapshot)
        return Observation(
            images=images,
            state=self.robot.state(snapshot.joints),
            prompt=self._prompt,
            stamps=dict(snapshot.stamps),
            joints=snapshot.joints,
        )

    def _watch_frozen(self, name: str, pixels: NDArray[np.uint8], snapshot: Snapshot) -> None:
        limit = self._cameras[name].frozen_after
        if limit <= 0.0:
            return
        digest = zlib.crc32(pixels[::4, ::4].tobytes())
        stamp, last = snapshot.stamps[name], self._frozen.get(name)
        if last is None or last.digest != digest or stamp < last.since:
            self._frozen[name] = _Frozen(digest, stamp, snapshot.joints)
            return
        same = (stamp - last.since) * 1e-9
        last.moved = max(last.moved, float(np.abs(snapshot.joints - last.joints).max(initial=0.0)))
        last.seconds = same if same >= limit and last.moved >= FROZEN_MOTION else 0.0

    def newest_joints(self) -> tuple[int, NDArray[np.float64]] | None:
        """(stamp, float64 [joints]) of the newest joint state; None before the first."""
        with self._lock:
            messages = self._inputs[JOINTS].messages
            return messages[-1] if messages else None

    def status(self, now: int) -> dict[str, InputStatus]:
        """Every input (cameras by name, "joints") at the time ``now``, nanoseconds."""
        with self._lock:
            return {name: self._status(source, now) for name, source in self._inputs.items()}

    def _status(self, source: _Input, now: int) -> InputStatus:
        stamp = source.messages[-1][0] if source.messages else 0
        frozen = self._frozen.get(source.name)
        return InputStatus(
            name=source.name,
            age=(now - stamp) * 1e-9 if source.messages else float("inf"),
            rate=source.rate(now),
            expected_rate=source.expected_rate,
            received=source.received,
            drops=dict(source.drops),
            frozen=frozen.seconds if frozen is not None else 0.0,
            stamp=stamp,
        )

    @property
    def prompt_drops(self) -> int:
        """Prompts refused so far."""
        return self._prompt_drops.total()

    def clear(self, before: int = 0) -> None:
        """Forget every message, also those still on their way: of stamps below ``before`` (nanoseconds).

        Counts and the prompt stay. After a clock jump no stamp is too old.
        """
        with self._lock:
            self._oldest = before
            for source in self._inputs.values():
                source.clear()
            self._frozen.clear()
