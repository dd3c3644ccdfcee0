"""Train the small pi0.5 on the simulated robot's expert: collect, learn, correct (DAgger), judge, save.

    python training/train.py --out runs/first                 # the shipped policy's settings, on a GPU
    python training/train.py --out runs/more --init runs/first/checkpoint      # further from a checkpoint
    python training/train.py --out runs/try --tiny            # the whole way in two minutes on a CPU

The learning rate follows the clock: warm-up, then a cosine that ends with ``--train-seconds``, so a run ends
annealed on any machine. Simulators run in ``--workers`` processes beside it. Everything drawn at random comes
from ``--seed``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "4")

import numpy as np
import torch
from collect import Frames
from hybrid_policy.evaluation.closed_loop import LoopSettings
from hybrid_policy.evaluation.success import summarise
from hybrid_policy.models.checkpoint import load_checkpoint
from hybrid_policy.models.checkpoint_writer import save_checkpoint
from hybrid_policy.models.observation import PolicySpec
from hybrid_policy.models.pi05 import Pi05
from hybrid_policy.sim.scene import JOINT_NAMES
from hybrid_policy.sim.tasks import PROMPTS, TASK_COLOURS, SceneSettings
from judging import line, localisation, short, statistics_of
from network import DeviceFrames, Grounding, TrainingPolicy, fresh_model, small_policy, statistics
from pool import SCENES, EpisodesJob, Pool
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from vocabulary import build, save

HELD_OUT, CORRECTED, JUDGED = 10**8, 2 * 10**8, 3 * 10**8  # where the seeds of other scenes begin
NOISES = 4  # noises and times for each prefix


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and figures")
    parser.add_argument("--init", type=Path, help="a checkpoint directory to go on from")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and few frames: tries the code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--frames", type=int, default=100_000, help="of the expert, at most")
    parser.add_argument("--collect-seconds", type=float, default=70.0, help="for the expert's frames, at most")
    parser.add_argument("--train-seconds", type=float, default=260.0, help="of gradient steps alone")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--corrections",
        type=float,
        nargs="*",
        default=[0.45, 0.6, 0.75, 0.88],
        help="shares of the training time at which the policy's own states are labelled",
    )
    parser.add_argument("--correction-episodes", type=int, default=192)
    parser.add_argument("--episodes", type=int, default=200, help="to judge the result by")
    parser.add_argument("--delays", type=float, nargs="*", default=[0.1], help="made delays (s) to judge at")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


class Batch(NamedTuple):
    """What one gradient step sees. B prefixes, NOISES noises and times of the flow for each.

    images: uint8 [B, cameras, S, S, 3]. words: int64 [B, L], counts: int64 [B]. actions: [B, H, A],
    normalised. cubes: [B, 3] (m), the named cube; patches: int64 [B], where it is in the overhead picture.
    noise: [B * NOISES, H, A]; times: [B * NOISES]. gain, shift: [B, 1, 3, 1, 1], of light and colours.
    """

    images: Tensor
    words: Tensor
    counts: Tensor
    actions: Tensor
    cubes: Tensor
    patches: Tensor
    noise: Tensor
    times: Tensor
    gain: Tensor
    shift: Tensor


class Trainer:
    """One run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.random = np.random.default_rng(args.seed)
        self.tokenizer = build(14)
        self.config = small_policy(self.tokenizer.get_vocab_size(), args.tiny)
        self.stats: dict[str, dict[str, Any]] | None = None
        if args.init is not None:
            loaded = load_checkpoint(args.init)
            self.config = loaded.config
            self.model = loaded.model.requires_grad_().train()
            self.stats = statistics_of(args.init)
        else:
            self.model = fresh_model(self.config, self.tokenizer, args.seed)
        self.model.to(self.device)
        self.grounding = Grounding(self.config).to(self.device)
        head = args.init.parent / "grounding.pt" if args.init is not None else None
        if head is not None and head.exists():
            self.grounding.load_state_dict(torch.load(head, map_location=self.device, weights_only=True))
        self.parameters = [*self.model.parameters(), *self.grounding.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        decayed = [p for p in self.parameters if p.ndim >= 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": 0.02},
                {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=args.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.spent = 0.0
        self.curve: list[dict[str, float]] = []
        self.losses = self._losses
        if self.device.type == "cuda" and not args.no_compile:
            torch._dynamo.config.suppress_errors = True
            self.losses = torch.compile(self._losses, dynamic=False)

    def say(self, text: str) -> None:
        """A line with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow-matching loss and grounding loss of one batch; light and colours are varied."""
        seen = batch.images.float().div(255.0).movedim(-1, 2)
        seen = (seen * batch.gain + batch.shift).clamp(0.0, 1.0) * 2.0 - 1.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            cache = self.model.prefix_cache(*self.model.embed_prefix(seen, None, batch.words, batch.counts))
            flow = self.model.training_loss(
                cache.repeat(NOISES), batch.actions.repeat_interleave(NOISES, 0), batch.noise, batch.times
            )
        return flow.mean(), self.grounding.loss(cache, batch.counts, batch.cubes, batch.patches)

    def _batch(self, data: DeviceFrames, own: DeviceFrames | None) -> Batch:
        """A batch as ``_losses`` takes it, a third of it from the policy's own states once there are any."""
        size, device, config = self.args.batch, self.device, self.config
        from_own = size // 3 if own is not None else 0
        rows = torch.randint(len(data), (size - from_own,), device=device)
        colour = torch.randint(2, (size,), device=device)
        parts = [(data, rows)]
        if own is not None:
            parts.append((own, torch.randint(len(own), (from_own,), device=device)))

        def draw(name: str, by_colour: bool) -> Tensor:
            drawn, at = [], 0
            for frames, chosen in parts:
                tensor = getattr(frames, name)
                which = colour[at : at + len(chosen)]
                drawn.append(tensor[chosen, which] if by_colour else tensor[chosen])
                at += len(chosen)
            return torch.cat(drawn)

        shape = (size * NOISES, config.horizon, config.max_action_dim)
        t = 0.999 * torch.distributions.Beta(1.5, 1.0).sample((size * NOISES,)).to(device) + 0.001
        gain = 1.0 + 0.15 * (2 * torch.rand(size, 1, 3, 1, 1, device=device) - 1)
        shift = 0.05 * (2 * torch.rand(size, 1, 3, 1, 1, device=device) - 1)
        return Batch(
            images=draw("images", False),
            words=draw("words", True).long(),
            counts=draw("counts", True).long(),
            actions=draw("actions", True),
            cubes=draw("cubes", True),
            patches=draw("patches", True).long(),
            noise=torch.randn(shape, device=device),
            times=t,
            gain=gain,
            shift=shift,
        )

    def warm_up(self) -> None:
        """Compile on noise while the simulators collect."""
        size, config = self.args.batch, self.config
        if self.device.type != "cuda":
            return
        blank = DeviceFrames(
            images=torch.randint(0, 255, (size, 2, 112, 112, 3), dtype=torch.uint8, device=self.device),
            words=torch.ones(size, 2, config.max_token_len, dtype=torch.int16, device=self.device),
            counts=torch.full((size, 2), 20, dtype=torch.int16, device=self.device),
            actions=torch.zeros(size, 2, config.horizon, config.max_action_dim, device=self.device),
            cubes=torch.zeros(size, 2, 3, device=self.device),
            patches=torch.zeros(size, 2, dtype=torch.int16, device=self.device),
        )
        for _ in range(3):
            flow, ground = self.losses(self._batch(blank, None))
            (flow + ground).backward()
        torch.cuda.synchronize()
        begin = time.monotonic()
        for _ in range(5):
            flow, ground = self.losses(self._batch(blank, None))
            (flow + ground).backward()
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        self.say(f"warm: {(time.monotonic() - begin) / 5 * 1e3:.0f} ms forward and backward")

    def train(self, until: float, data: DeviceFrames, own: DeviceFrames | None) -> None:
        """Gradient steps until ``until`` seconds have been spent on them."""
        args = self.args
        begin, before, last = time.monotonic(), self.spent, 0.0
        sums = torch.zeros(2, device=self.device)
        count = 0
        while self.spent < until:
            progress = min(1.0, self.spent / args.train_seconds)
            warm = min(1.0, (self.step + 1) / 200)
            rate = args.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            flow, ground = self.losses(self._batch(data, own))
            weight = 0.5 if progress < 0.5 else 0.2
            (flow + weight * ground).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            sums += torch.stack((flow.detach(), ground.detach()))
            count += 1
            self.step += 1
            self.spent = before + time.monotonic() - begin
            if self.step % 50 == 0:
                mean = (sums / count).tolist()
                if not all(map(math.isfinite, mean)):
                    raise RuntimeError(f"loss is not finite at step {self.step}: {mean}")
                self.curve.append(
                    {
                        "step": self.step,
                        "seconds": round(self.spent, 1),
                        "flow": mean[0],
                        "grounding": mean[1],
                        "learning_rate": rate,
                    }
                )
                if self.spent - last > 15:
                    last = self.spent
                    self.say(f"step {self.step}: flow {mean[0]:.4f}, grounding {mean[1]:.4f}, {self.spent:.0f} s")
                sums.zero_()
                count = 0

    def averaged(self) -> tuple[Pi05, Grounding]:
        """The averaged weights, rounded to bf16 as they will be saved, in fresh modules."""
        model = Pi05(self.config).to(self.device)
        head = Grounding(self.config).to(self.device)
        with torch.no_grad():
            for target, value in zip([*model.parameters(), *head.parameters()], self.average):
                target.copy_(value)
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model.eval(), head.eval()

    def spec(self) -> PolicySpec:
        """Dimensions, as the controller asks for them."""
        c = self.config
        return PolicySpec("training", c.cameras, c.state_dim, c.action_dim, c.max_action_dim, c.horizon)

    def run(self) -> int:
        """Everything, in order."""
        args = self.args
        args.out.mkdir(parents=True, exist_ok=True)
        parts_size = 40 if args.tiny else 250
        pool = Pool(args.workers)
        horizon, size = self.config.horizon, self.config.image_size
        pool.start_collecting(args.seed * 10**6, parts_size, size, horizon, 0.5)
        self.say(f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters on {self.device}")
        parts: list[Frames] = []
        taking = threading.Thread(target=self._take, args=(pool, parts))
        taking.start()
        self.warm_up()
        taking.join()
        self.stats = self.stats or statistics(Frames.joined(parts[:40]))
        policy = TrainingPolicy(self.model, self.stats, self.tokenizer, self.device)
        prompts = [[phrase.format(colour) for phrase in PROMPTS] for colour in TASK_COLOURS]
        data: DeviceFrames | None = None
        for at in range(0, len(parts), 40):
            joined = DeviceFrames.of(Frames.joined(parts[at : at + 40]), policy, prompts, self.random)
            data = joined if data is None else data.extended(joined)
        assert data is not None
        del parts
        self.say(f"{len(data)} frames of the expert")
        pool.start_collecting(HELD_OUT + args.seed * 10**6, 16 if args.tiny else 32, size, horizon, 2.0)
        held_out = Frames.joined(list(pool.collected(0.0, 0)))
        own: DeviceFrames | None = None
        marks = [share * args.train_seconds for share in args.corrections]
        for round_, mark in enumerate([*marks, args.train_seconds]):
            self.train(mark, data, own)
            model, head = self.averaged()
            policy = TrainingPolicy(model, self.stats, self.tokenizer, self.device)
            self.save(model, head)
            self.say(f"step {self.step}: {line(localisation(held_out, policy, head))}")
            if round_ < len(marks):
                first = CORRECTED + args.seed * 10**6 + round_ * 10**4
                job = EpisodesJob(
                    tuple(range(first, first + args.correction_episodes)),
                    self.spec(),
                    SCENES,
                    LoopSettings(),
                    size,
                    label=True,
                )
                results, frames = pool.episodes(job, policy)
                self.say(f"own states: {line(short(summarise(results)))}, {len(frames or [])} frames")
                if frames is not None:
                    new = DeviceFrames.of(frames, policy, prompts, self.random)
                    own = new if own is None else own.extended(new)
        self.judge(pool, policy, localisation(held_out, policy, head))
        pool.close()
        return 0

    def _take(self, pool: Pool, parts: list[Frames]) -> None:
        """Collect the expert's frames into ``parts``, with a bar."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("frames of the expert", total=self.args.frames)
            left = max(5.0, self.args.collect_seconds - (time.monotonic() - self.began))
            for part in pool.collected(left, self.args.frames):
                parts.append(part)
                progress.advance(bar, len(part))

    def save(self, model: Pi05, head: Grounding) -> None:
        """Checkpoint, grounding head, curve."""
        out = self.args.out
        assert self.stats is not None
        (out / "checkpoint").mkdir(exist_ok=True)
        save(self.tokenizer, out / "checkpoint" / "tokenizer.json")
        save_checkpoint(
            out / "checkpoint",
            model,
            self.config,
            self.stats,
            out / "checkpoint" / "tokenizer.json",
            action_names=JOINT_NAMES,
            dtype=torch.bfloat16,
        )
        torch.save(head.state_dict(), out / "grounding.pt")
        if self.curve:
            with (out / "curve.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self.curve[0]))
                writer.writeheader()
                writer.writerows(self.curve)

    def judge(self, pool: Pool, policy: TrainingPolicy, errors: dict[str, float]) -> None:
        """Closed loop on scenes never seen, the figures to figures.json."""
        args = self.args
        figures: dict[str, Any] = {"localisation": errors, "steps": self.step, "closed_loop": {}}
        seeds = tuple(range(JUDGED, JUDGED + args.episodes))
        for name, scenes in (("two cubes", SceneSettings()), ("third cube", SceneSettings(distractor=1.0))):
            for delay in args.delays if name == "two cubes" else args.delays[:1]:
                job = EpisodesJob(seeds, self.spec(), scenes, LoopSettings(delay=delay), self.config.image_size)
                results, _ = pool.episodes(job, policy)
                summary = summarise(results)
                figures["closed_loop"][f"{name}, delay {delay * 1e3:.0f} ms"] = summary
                self.say(f"{name}, delay {delay * 1e3:.0f} ms: {line(short(summary))}")
        figures["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        figures["seconds"] = round(time.monotonic() - self.began, 1)
        (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(Trainer(arguments()).run())
