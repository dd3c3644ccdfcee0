"""Inputs: matched by stamp, each watched; the watchdog, the clock, the latency log."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hybrid_policy.control.latency import ChunkRecord, LatencyRecorder
from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.control.robot_file import RobotFile
from hybrid_policy.control.watchdog import ClockMonitor, Tracking, Watchdog
from hybrid_policy.errors import InputError

from .synthetic import TWO_JOINTS, image, joint_state, robot  # isort: skip

MS = 1_000_000
T0 = 100 * 10**9
TWO_CAMERAS = TWO_JOINTS.replace(
    "[{name: cam, topic: cam/image_raw, rate: 20}]",
    "[{name: cam, topic: cam/image_raw, rate: 20}, {name: wrist, topic: wrist, rate: 20}]",
)


def make(tmp_path: Path, text: str = TWO_CAMERAS) -> tuple[RobotFile, ObservationBuffer]:
    two = robot(tmp_path, text)
    return two, ObservationBuffer(two, two.cameras)


def joints(buffer: ObservationBuffer, ms: float, a: float = 0.0) -> None:
    buffer.receive_joints(joint_state(T0 + round(ms * MS), ["a", "b"], [a, 0.05]))


def show(buffer: ObservationBuffer, camera: str, ms: float, value: int = 0) -> None:
    buffer.receive_image(camera, image(T0 + round(ms * MS), value))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    assert buffer.snapshot().missing == ("cam", "wrist", "joints")
    show(buffer, "cam", 0)
    joints(buffer, 0)
    assert buffer.snapshot().missing == ("wrist",)


def test_matched_by_stamp_not_by_arrival(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    for ms in (0, 50, 100):
        show(buffer, "cam", ms, ms)
    show(buffer, "wrist", 3, 7)
    show(buffer, "wrist", 53, 8)  # the wrist's frame of 103 has not come yet
    for ms in (-10, 10, 30, 52, 70, 90, 110):
        joints(buffer, ms, ms / 1000)
    snapshot = buffer.snapshot()
    assert {k: (v - T0) // MS for k, v in snapshot.stamps.items()} == {"cam": 50, "wrist": 53, "joints": 52}
    assert snapshot.skew == pytest.approx(0.003)
    seen = buffer.observe(snapshot)
    assert seen.images["cam"][0, 0].tolist() == [50, 50, 50]
    assert seen.joints.tolist() == [0.052, 0.05]
    np.testing.assert_allclose(seen.state, [0.3, 0.052], atol=1e-6)
    assert seen.stamp == T0 + 52 * MS
    assert seen.prompt == "go"


def test_duplicated_reordered_and_reset_stamps(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    show(buffer, "cam", 100)
    with pytest.raises(InputError, match="given twice"):
        show(buffer, "cam", 100)
    with pytest.raises(InputError, match=r"50\.0 ms before the last"):
        show(buffer, "cam", 50)
    assert buffer.status(T0)["cam"].stamp == T0 + 100 * MS
    show(buffer, "cam", -5000)  # a driver's clock that was set back by 5 s is not reordering
    status = buffer.status(T0 + 100 * MS)["cam"]
    assert status.drops == {"duplicate stamp": 1, "out of order": 1, "stamp jumped back": 1}
    assert status.age == pytest.approx(5.1)
    faults = Watchdog(buffer.robot.timeouts, 1.0).inputs({"cam": status})
    assert [fault.kind for fault in faults] == ["stale"]


def test_invalid_messages_are_counted_and_named(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    wrong = image(T0)
    wrong.encoding = "yuv422"
    with pytest.raises(InputError, match="cam: encoding: 'yuv422' given"):
        buffer.receive_image("cam", wrong)
    with pytest.raises(InputError, match=r"cam: header\.stamp: 0 given"):
        buffer.receive_image("cam", image(0))
    with pytest.raises(InputError, match="a: 7 given, expected a position from -2 to 2"):
        joints(buffer, 0, 7.0)
    with pytest.raises(InputError, match="prompt: empty"):
        buffer.receive_prompt(type("String", (), {"data": " "})())
    assert buffer.status(T0)["cam"].drops == {"invalid": 2}
    assert buffer.status(T0)["joints"].drops == {"invalid": 1}
    assert buffer.prompt == "go"
    assert buffer.prompt_drops == 1


def test_rate_and_age(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    for k in range(21):
        show(buffer, "cam", 100 * k, k)  # half of the 20 Hz that the file expects
    status = buffer.status(T0 + 2_300 * MS)["cam"]
    assert status.rate == pytest.approx(10.0)
    assert status.age == pytest.approx(0.3)
    assert buffer.status(T0 + 9_000 * MS)["cam"].rate == 0.0
    assert buffer.status(T0)["wrist"].age == float("inf")


def test_frozen_only_while_the_robot_moves(tmp_path: Path) -> None:
    _, buffer = make(tmp_path, TWO_JOINTS)

    def run(start: int, moving: bool, changing: bool) -> float:
        for k in range(30):
            show(buffer, "cam", start + 50 * k, k if changing else 9)
            joints(buffer, start + 50 * k, 0.01 * k if moving else 0.0)
            buffer.observe(buffer.snapshot())
        return buffer.status(T0)["cam"].frozen

    assert run(0, moving=True, changing=True) == 0.0
    assert run(2_000, moving=False, changing=False) == 0.0
    assert run(4_000, moving=True, changing=False) > 1.0
    assert run(6_000, moving=True, changing=True) == 0.0


def test_a_camera_stays_frozen_when_the_robot_comes_back(tmp_path: Path) -> None:
    _, buffer = make(tmp_path, TWO_JOINTS)
    seen = []
    for k in range(80):  # out and back, and then it stands
        show(buffer, "cam", 50 * k, 9 if k < 70 else k)
        joints(buffer, 50 * k, 0.3 * np.sin(np.pi * min(k, 50) / 50))
        buffer.observe(buffer.snapshot())
        seen.append(buffer.status(T0)["cam"].frozen > 0.0)
    began = seen.index(True)
    assert all(seen[began:70])
    assert not any(seen[70:])


def test_watchdog_names_each_fault(tmp_path: Path) -> None:
    two, buffer = make(tmp_path, TWO_JOINTS)
    watchdog = Watchdog(two.timeouts, output_timeout=1.0)
    assert [f.kind for f in watchdog.inputs(buffer.status(T0))] == ["missing", "missing"]
    show(buffer, "cam", 0)
    joints(buffer, 0)
    assert watchdog.inputs(buffer.status(T0 + 150 * MS)) == []
    stale = watchdog.inputs(buffer.status(T0 + 210 * MS))
    assert [str(f) for f in stale] == ["joints: 0.21 s old, expected at most 0.2 s"]
    assert [f.source for f in watchdog.inputs(buffer.status(T0 + 600 * MS))] == ["cam", "joints"]
    assert [f.kind for f in watchdog.inputs(buffer.status(T0 - 200 * MS))] == ["future", "future"]
    assert watchdog.skew({}) == []
    assert watchdog.skew({"cam": T0, "joints": T0 + 100 * MS}) == []
    apart = watchdog.skew({"cam": T0, "joints": T0 + 110 * MS})
    assert str(apart[0]) == "inputs: cam is 0.110 s behind joints, expected at most 0.1 s"
    assert watchdog.output(T0, None) == []
    assert watchdog.output(T0 + 999 * MS, T0) == []
    assert watchdog.output(T0 + 1001 * MS, T0)[0].kind == "overdue"


def test_clock_jumps() -> None:
    clock = ClockMonitor()
    assert clock.look(0, 5) is None  # sim time that has not begun
    assert clock.look(T0, 10) is None
    assert clock.look(T0 + 100 * MS, 10 + 100 * MS) is None
    back = clock.look(T0 + 90 * MS, 10 + 110 * MS)
    assert back is not None
    assert str(back) == "clock: went back by 0.010 s"
    ahead = clock.look(T0 + 5_090 * MS, 10 + 120 * MS)
    assert ahead is not None
    assert ahead.kind == "forward"
    assert (clock.backward_jumps, clock.forward_jumps) == (1, 1)
    fast = ClockMonitor(fastest=10.0)
    fast.look(T0, 0)
    assert fast.look(T0 + 900 * MS, 100 * MS) is None  # a simulation nine times as fast is no jump


def record(chunk: int, total: float = 10.0, **changes: Any) -> ChunkRecord:
    values: dict[str, Any] = {
        "chunk": chunk, "stamps": {"cam": 1}, "skew_ms": 0.0, "started": 1, "decode_ms": 1.0,
        "stages_ms": {"vision": 2.0}, "infer_ms": 8.0, "publish_ms": 1.0, "total_ms": total,
        "stamp_to_publish_ms": 20.0, "age_at_due_ms": 30.0, "first_due": 2, "cut": 1, "consumed": 0,
        "delay": 0, "deadline_ms": 200.0, "deadline_met": True, "accepted": True,
    }  # fmt: skip
    return ChunkRecord(**{**values, **changes})


def test_latency_log_and_summary(tmp_path: Path) -> None:
    path = tmp_path / "new" / "latency.jsonl"
    recorder = LatencyRecorder(path, capacity=100)
    for k in range(150):
        recorder.add(record(k, total=float(k), deadline_met=k % 10 != 0, accepted=k != 3))
    summary = recorder.summary()
    assert (summary.chunks, summary.misses, summary.refused) == (150, 15, 1)
    assert summary.stages["total"].max == 149.0
    assert summary.stages["total"].p50 == pytest.approx(99.5)  # of the last hundred
    assert recorder.summary(last=10).stages["total"].p50 == pytest.approx(144.5)
    assert "15 deadlines missed" in summary.table()
    recorder.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["chunk"] for line in lines] == list(range(150))
    assert ChunkRecord(**lines[7]) == record(7, total=7.0)


def test_a_full_disk_does_not_stop_the_recorder() -> None:
    recorder = LatencyRecorder(Path("/dev/full"))
    for k in range(3):
        recorder.add(record(k))
    assert recorder.error == "/dev/full: No space left on device"
    assert recorder.unwritten == 3
    assert recorder.summary().chunks == 3
    recorder.close()


def test_a_log_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorder = LatencyRecorder(tmp_path / "file" / "log.jsonl")
    assert "file" in recorder.error
    recorder.add(record(0))
    assert recorder.summary().chunks == 1


def test_waiting_for_images(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    assert buffer.camera_period == 0.05
    assert not buffer.wait_for_images({}, fresh=10.0, patience=0.01)  # none yet
    show(buffer, "cam", 0)
    show(buffer, "wrist", 5)
    joints(buffer, 0)
    used = buffer.snapshot().stamps
    assert buffer.wait_for_images({}, fresh=10.0, patience=0.0)  # these have just come, and are new
    assert not buffer.wait_for_images(used, fresh=10.0, patience=0.01)  # they are in use
    assert not buffer.wait_for_images({}, fresh=0.0, patience=0.01)  # they are not fresh
    seen: list[bool] = []
    waiting = threading.Thread(target=lambda: seen.append(buffer.wait_for_images(used, 0.0, 20.0)))
    waiting.start()
    show(buffer, "cam", 50)
    waiting.join(0.05)
    assert waiting.is_alive()  # one of two cameras
    show(buffer, "wrist", 55)
    waiting.join(10)
    assert seen == [True]
    stamps = buffer.snapshot().stamps
    assert (stamps["cam"], stamps["wrist"]) == (T0 + 50 * MS, T0 + 55 * MS)


def test_a_robot_that_stays_away_from_its_command() -> None:
    tracking, command, there = Tracking(0.1), np.array([0.0, 1.0]), np.array([0.0, 1.2])
    assert not tracking.away(command, there, T0)
    assert not tracking.away(command, there, T0 + 400 * MS)
    assert not tracking.away(command, command, T0 + 450 * MS)  # it was back for a moment
    assert not tracking.away(command, there, T0 + 600 * MS)
    assert not tracking.away(command, there, T0 + 1100 * MS)
    assert tracking.away(command, there, T0 + 1101 * MS)
    assert not tracking.away(command, None, T0 + 1200 * MS)  # where it is, is not known
    tracking.reset()
    assert not tracking.away(command, there, T0 + 1300 * MS)
    off = Tracking(0.0)
    assert not any(off.away(command, there, T0 + k * 10**9) for k in range(5))


def test_what_was_on_its_way_at_a_reset_is_forgotten_too(tmp_path: Path) -> None:
    _, buffer = make(tmp_path)
    for name in ("cam", "wrist"):
        show(buffer, name, 0)
    buffer.clear(before=T0 + 60 * MS)
    show(buffer, "cam", 50, 1)  # drawn before the reset, received after it
    joints(buffer, 55)
    assert buffer.snapshot().missing == ("cam", "wrist", "joints")
    assert buffer.status(T0 + 60 * MS)["cam"].drops == {"before the reset": 1}
    show(buffer, "cam", 60, 2)
    show(buffer, "wrist", 70)
    joints(buffer, 65)
    assert buffer.snapshot().stamps["cam"] == T0 + 60 * MS
    buffer.clear()  # the clock was set back: no stamp is too old
    show(buffer, "cam", 10)
    assert "cam" not in buffer.snapshot().missing
