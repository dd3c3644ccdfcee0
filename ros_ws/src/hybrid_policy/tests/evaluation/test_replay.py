"""Replays: deterministic, by the bag's clock, and through the node's own safety."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hybrid_policy.errors import InputError
from hybrid_policy.evaluation import metrics
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.bag_writer import BagWriter
from hybrid_policy.evaluation.delays import DelayModel, from_log
from hybrid_policy.evaluation.node_parameters import read_parameters
from hybrid_policy.evaluation.policy_pass import fit_robot
from hybrid_policy.evaluation.replay import Replay
from hybrid_policy.evaluation.replay_record import RecipeRun, ReplaySettings
from hybrid_policy.evaluation.survey import survey
from hybrid_policy.evaluation.topic_match import match_topics
from stub_policy import StubPolicy

NODE = read_parameters(None, {})


def settings(delay=None, duration=0.0, **node) -> ReplaySettings:
    return ReplaySettings(dataclasses.replace(NODE, **node), delay or DelayModel(), duration)


def replay(path, robot, given=None, amount: float = 0.0, policy=None) -> RecipeRun:
    bag = open_bag(path)
    known = survey(bag, robot, match_topics(robot, bag.topics, {}))
    assert known.lacks == []
    fitted = fit_robot(robot, known)
    policy = policy or StubPolicy(amount, ("base_0_rgb", "right_wrist_0_rgb"), 14)
    one = Replay(fitted, policy, known, settings=given or settings(), recipe="r",
                 score=metrics.Recorded(known, fitted).score)  # fmt: skip
    for _ in one.run(bag):
        pass
    return one.run_record


def edit(path, target, change):
    """A copy of a bag; ``change(topic, message, t_ns)`` gives (message, t_ns), or None to leave it out."""
    from hybrid_policy.evaluation.message_types import Decoder

    bag = open_bag(path)
    decoder = Decoder(bag.topics)
    entries = []
    for message in bag.messages():
        changed = change(message.topic, decoder.decode(message), message.t_ns)
        if changed is not None:
            entries.append((changed[1], message.topic, message.type, changed[0]))
    with BagWriter(target) as writer:
        for t, topic, kind, message in entries:
            writer.write(topic, kind, message, t)
    return target


def test_inferences_start_on_the_grid_and_take_the_delay(sim_expert, robot):
    run = replay(sim_expert, robot, settings(inference_rate=4.0, delay=DelayModel(fixed=120_000_000)))
    started = np.array([c.started for c in run.chunks])
    assert (np.diff(started) == 250_000_000).all()
    assert {c.finished - c.started for c in run.chunks} == {120_000_000}
    assert run.missed == 0
    assert all(c.accepted for c in run.chunks)


def test_an_inference_longer_than_its_period_misses_starts(sim_expert, robot):
    run = replay(sim_expert, robot, settings(inference_rate=10.0, delay=DelayModel(fixed=250_000_000)))
    assert (np.diff([c.started for c in run.chunks]) == 300_000_000).all()
    assert run.missed > 30


def test_an_observation_holds_only_what_had_arrived(sim_expert, robot):
    """Frames are recorded some milliseconds after their stamp: at a start the newest may not be there yet."""
    bag = open_bag(sim_expert)
    arrivals = [m.t_ns for m in bag.messages(["/joint_states"])]
    run = replay(sim_expert, robot)
    for chunk in run.chunks:
        assert all(age >= 0.0 for age in chunk.ages.values())
        assert sum(t <= chunk.started for t in arrivals) > 0
        assert chunk.stamp <= chunk.started


def test_two_replays_are_the_same_to_the_bit(sim_expert, robot):
    drawn = settings(delay=DelayModel(recorded=(30_000_000, 90_000_000, 150_000_000), seed=3))
    first, second = (replay(sim_expert, robot, drawn, 0.01) for _ in range(2))
    for a, b in zip(first.chunks, second.chunks, strict=True):
        da, db = dataclasses.asdict(a), dataclasses.asdict(b)
        da.pop("timings"), db.pop("timings")
        np.testing.assert_equal(da, db)
    np.testing.assert_array_equal(np.array(first.executed), np.array(second.executed))
    assert len({c.finished - c.started for c in first.chunks}) == 3


def test_a_camera_that_stops_holds_the_robot_and_it_goes_on_after(sim_expert, robot, tmp_path):
    start = open_bag(sim_expert)
    t0 = next(iter(start.messages())).t_ns

    def change(topic, message, t):
        gone = topic.startswith("/camera_overhead") and 2.0 < (t - t0) * 1e-9 < 4.0
        return None if gone else (message, t)

    run = replay(edit(sim_expert, tmp_path / "gap", change), robot)
    (hold,) = run.holds
    assert "base_0_rgb" in hold[1]
    assert 2.3 < (hold[0] - t0) * 1e-9 < 2.7  # camera timeout 0.5 s, plus a tick
    times = np.array(run.executed_times)
    still = np.array(run.executed)[(times > hold[0]) & ((times - t0) * 1e-9 < 3.9)]
    assert len(still) > 20
    assert np.ptp(still, axis=0).max() == 0.0
    assert any((c.started - t0) * 1e-9 > 4.0 and c.accepted for c in run.chunks)
    assert not any(2.6 < (c.started - t0) * 1e-9 < 4.0 for c in run.chunks)


def test_a_nan_chunk_is_refused_and_the_robot_held(sim_expert, robot):
    run = replay(sim_expert, robot, amount=float("nan"))
    found = metrics.motion(run)
    assert found["accepted"] == 0
    assert found["refused"] == found["chunks"] > 30
    assert "expected finite numbers" in next(iter(found["refusals"]))
    # nothing but standing where it was when the first chunk was refused
    assert np.ptp(np.array(run.executed), axis=0).max() <= 1e-9 + np.ptp([c.joints for c in run.chunks], axis=0).max()


def test_a_damaged_jpeg_costs_one_inference_not_the_replay(sim_expert, robot, tmp_path):
    seen = []

    def change(topic, message, t):
        if topic.startswith("/camera_overhead"):
            seen.append(t)
            if 40 <= len(seen) < 60:
                return dataclasses.replace(message, data=message.data[:200].copy()), t
        return message, t

    run = replay(edit(sim_expert, tmp_path / "damaged", change), robot)
    assert sum(run.damaged.values()) >= 3
    assert len(run.chunks) > 25


def test_after_a_clock_reset_the_replay_starts_anew(sim_expert, robot, tmp_path):
    t0 = next(iter(open_bag(sim_expert).messages())).t_ns

    def change(topic, message, t):
        if (t - t0) * 1e-9 < 3.5 or not hasattr(message, "header"):
            return message, t
        old = message.header.stamp
        stamp = dataclasses.replace(old, sec=old.sec - 3)
        return dataclasses.replace(message, header=dataclasses.replace(message.header, stamp=stamp)), t

    run = replay(edit(sim_expert, tmp_path / "reset", change), robot)
    assert {c.segment for c in run.chunks} == {0, 1}
    first = next(c for c in run.chunks if c.segment == 1)
    assert not first.continued  # RTC does not continue a chunk from before the reset
    assert len([c for c in run.chunks if c.segment == 1]) > 12


def test_zero_stamps_are_replayed_by_record_time(sim_expert, robot, tmp_path):
    def change(topic, message, t):
        if not hasattr(message, "header"):
            return message, t
        stamp = dataclasses.replace(message.header.stamp, sec=0, nanosec=0)
        return dataclasses.replace(message, header=dataclasses.replace(message.header, stamp=stamp)), t

    run = replay(edit(sim_expert, tmp_path / "zero", change), robot)
    assert len(run.chunks) > 30
    assert all(c.accepted for c in run.chunks)


def test_duration_ends_a_replay_early(sim_expert, robot):
    run = replay(sim_expert, robot, settings(duration=2.0))
    assert 8 <= len(run.chunks) <= 11


def test_ensembling_and_no_chunking_run_too(sim_expert, robot):
    for chunking in ("ensemble", "off"):
        run = replay(sim_expert, robot, settings(chunking=chunking), 0.01)
        assert not any(c.continued for c in run.chunks)
        assert sum(c.accepted for c in run.chunks) > 30


def test_pictures_of_the_worst_chunks_are_kept(sim_expert, robot):
    run = replay(sim_expert, robot)
    scores = [m.score for m in run.worst]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert {p.shape for m in run.worst for p in m.pictures.values()} == {(240, 240, 3)}


class TestNodeParameters:
    def test_the_defaults_are_the_nodes_own(self):
        parameters = pytest.importorskip("hybrid_policy.ros.parameters", reason="rclpy is not installed")
        theirs = {p.name.replace(".", "__"): p.default for p in parameters.PARAMETERS}
        assert dataclasses.asdict(NODE) == {name: theirs[name] for name in dataclasses.asdict(NODE)}

    def test_a_file_goes_over_the_defaults_and_the_command_line_over_both(self, tmp_path):
        path = tmp_path / "params.yaml"
        path.write_text(
            "/**:\n  ros__parameters: {blend: 0, chunking: ensemble, rtc: {mode: prefix}, unknown: 1}\n"
            "policy_node:\n  ros__parameters: {inference_rate: 8}\nother:\n  ros__parameters: {seed: 9}\n"
        )
        made = read_parameters(path, {"chunking": "off", "seed": None})
        assert (made.blend, made.chunking, made.rtc__mode, made.inference_rate, made.seed) == (
            0.0,
            "off",
            "prefix",
            8.0,
            0,
        )
        assert made.joint_margin == NODE.joint_margin

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("/**: {ros__parameters: {blend: fast}}", "blend: 'fast' given, expected a number"),
            ("/**: {ros__parameters: {inference_rate: 0}}", "inference_rate: 0.0 given"),
            ("/**: {ros__parameters: {chunking: sometimes}}", "chunking: 'sometimes' given, expected rtc or ensemble"),
            ("/**: {blend: 1}", "expected ros__parameters below it"),
            ("just text", "not a ROS 2 parameter file"),
            ("a: [", "not readable"),
        ],
    )
    def test_a_file_that_means_nothing_is_one_clear_error(self, tmp_path, text, expected):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(InputError, match=expected):
            read_parameters(tmp_path / "params.yaml", {})


class TestDelays:
    def line(self, number, infer):
        return json.dumps({"chunk": number, "stamps": {}, "started": 1, "infer_ms": infer, "decode_ms": 1.0})

    def test_delays_come_from_a_log_without_its_cold_start(self, tmp_path):
        log = tmp_path / "log.jsonl"
        log.write_text("\n".join([self.line(0, 900.0), self.line(1, 50.0), self.line(2, 70.0), '{"chunk": 3, "st']))
        model = from_log(log, seed=1)
        assert model.recorded == (51_000_000, 71_000_000)
        draws = model.draws()
        first = [next(draws) for _ in range(50)]
        again = model.draws()
        assert first == [next(again) for _ in range(50)]
        assert set(first) == {51_000_000, 71_000_000}
        assert "2 delays" in model.text

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("", "holds no chunk"), ("rubbish\n{}", "line 1: not JSON"), ('{"chunk": 1}', "no stamps in its lines")],
    )
    def test_what_is_no_log_is_one_clear_error(self, tmp_path, text, expected):
        (tmp_path / "log").write_text(text)
        with pytest.raises(InputError, match=expected):
            from_log(tmp_path / "log")
        with pytest.raises(InputError, match="not readable"):
            from_log(tmp_path / "none")
