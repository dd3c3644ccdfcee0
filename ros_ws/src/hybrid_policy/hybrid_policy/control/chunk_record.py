"""The line of the latency log that belongs to one cycle."""

from __future__ import annotations

from hybrid_policy.control.cycle import CycleResult
from hybrid_policy.control.latency import ChunkRecord
from hybrid_policy.control.observation_buffer import Snapshot
from hybrid_policy.models.observation import ActionChunk


def chunk_record(
    result: CycleResult,
    chunk: ActionChunk,
    snapshot: Snapshot,
    marks: tuple[int, int, int, int],
    *,
    number: int,
    sent: int,
    period: int,
    deadline: int,
) -> ChunkRecord:
    """Everything about one chunk, as a :class:`ChunkRecord`.

    marks: steady nanoseconds at which inputs were taken, inference began, it ended, and the message was
    sent. sent: the stamps' clock when the message was sent. period: nanoseconds between inferences.
    deadline: steady nanoseconds by which the message had to be sent.
    """
    began, before, after, done = marks
    images = [snapshot.stamps[name] for name in snapshot.images]
    previous, guard, seam = result.previous, result.guard, result.seam
    return ChunkRecord(
        chunk=number,
        stamps=dict(snapshot.stamps),
        skew_ms=snapshot.skew * 1e3,
        started=result.started,
        decode_ms=(before - began) * 1e-6,
        stages_ms={name: seconds * 1e3 for name, seconds in chunk.timings.items()},
        infer_ms=(after - before) * 1e-6,
        publish_ms=(done - after) * 1e-6,
        total_ms=(done - began) * 1e-6,
        stamp_to_publish_ms=(sent - max(images, default=chunk.stamp)) * 1e-6,
        age_at_due_ms=(max(result.first_due, sent) - chunk.stamp) * 1e-6,
        first_due=result.first_due,
        cut=result.first,
        consumed=previous.consumed if previous is not None else 0.0,
        delay=previous.delay if previous is not None else 0,
        deadline_ms=period * 1e-6,
        deadline_met=done <= deadline,
        accepted=result.trajectory is not None,
        reason=result.reason,
        seam_position=seam.position,
        seam_velocity=seam.velocity,
        seam_acceleration=seam.acceleration,
        clipped=guard.position + guard.velocity + guard.acceleration,
        prompt=result.observation.prompt,
        finished=result.finished,
    )
