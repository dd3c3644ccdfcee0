"""The loop kernel: packing on any machine, machine code where nvcc is, results where a Hopper GPU is."""

import math
import re

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import expert, expert_loop, expert_loop_packing, fp8, nvfp4
from hybrid_policy.kernels.expert_reference import ReferenceLayer, layer_reference
from hybrid_policy.kernels.flow_step import FlowWeights, Guide, flow_step_reference
from hybrid_policy.kernels.qkv import rope_tables

from .devices import on_hopper
from .machine_code import compiled, disassembled, nvcc

H100_LIMIT = 232448  # bytes of shared memory a block
HYBRID = {"qkv": "e4m3", "o": "e4m3", "gate_up": "nvfp4", "down": "e4m3"}
SEED = HYBRID | {"qkv": "bf16", "o": "bf16"}
BF16 = dict.fromkeys(expert_loop_packing.STAGES, "bf16")
FP8 = dict.fromkeys(expert_loop_packing.STAGES, "w8a8")


def as_bf16(bits):
    return torch.tensor([bits & 0xFFFF], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double().item()


def operand(fmt, words, scale_word, k8, r8, e):
    """Element (k8, r8, e) of one k step as expert_loop_parts.cu's operand_of makes it, without the power of two."""
    half = 16 * e
    if fmt == "bf16":
        return as_bf16(words[2 * k8 + r8] >> half)
    if fmt == "e4m3":
        word = words[k8]
        first, second = word & 0x87F087F0, (word << 4) & 0x80F080F0 | (word >> 4) & 0x07000700
        return as_bf16((second if r8 else first) >> half) * 2.0**120
    if fmt == "w8a8":
        byte = words[r8 + 2 * k8] >> 8 * e & 0xFF
        return torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).double().item()
    word, mask = words[0], 0x81C081C0
    pairs = word & mask, (word << 3 ^ word << 2) & mask, word << 6 & mask, (word << 1 ^ word >> 4) & mask
    return as_bf16(pairs[2 * k8 + r8] >> half) * 2.0**126 * as_bf16(scale_word >> 16 * r8) * 2.0**-119


def inner_half(column):
    return column % 32 // 16


@pytest.mark.parametrize("fmt", expert_loop_packing.SIXTEEN)
def test_pieces_hold_every_weight(fmt):
    """Walk every element by the module's description; read it as the kernel does."""
    torch.manual_seed(0)
    n, k = 32, 256
    scales = None
    if fmt == "nvfp4":
        values, scales = torch.randint(0, 16, (n, k), dtype=torch.uint8), torch.rand(n, k // 16).to(torch.float8_e4m3fn)
        expected = nvfp4.decode_e2m1(values).double() * scales.double().repeat_interleave(16, -1)
    else:
        values = torch.randn(n, k).to(torch.bfloat16 if fmt == "bf16" else torch.float8_e4m3fn)
        expected = values.double()
    cut = expert_loop_packing.pieces(fmt, values, scales)
    per16, size = expert_loop_packing.SIXTEEN[fmt]
    sixteens = expert_loop_packing.LOADS
    assert cut.shape == (n // 16, k // 16 // (sixteens * per16), sixteens * size)
    for row in range(0, n, 3):
        for column in range(0, k, 5):
            tile, (g, r8) = row // 16, divmod(row % 16, 2)
            step, inner = divmod(column, 16)
            k8, (t, e) = inner // 8, divmod(inner % 8, 2)
            if fmt == "w8a8":  # steps of 32: their two halves in k8's place, four values in a word
                step, k8, (t, e) = column // 32 * 2, inner_half(column), divmod(column % 16, 4)
            piece, rest = divmod(step, sixteens * per16)
            i, within = divmod(rest, per16)
            data = cut[tile, piece]
            lane = data[i * 512 + (4 * g + t) * 16 :][:16].contiguous().view(torch.int32).tolist()
            words = {"bf16": lane, "e4m3": lane[2 * within :], "nvfp4": lane[within:], "w8a8": lane}[fmt]
            scale = 0
            if fmt == "nvfp4":
                at = sixteens * 512 + i * 128 + g * 16 + within * 4
                scale = data[at : at + 4].contiguous().view(torch.int32).item() & 0xFFFFFFFF
            got = operand(fmt, [w & 0xFFFFFFFF for w in words], scale, k8, r8, e)
            assert got == expected[row, column].item(), (row, column)


@pytest.mark.parametrize("stage", expert_loop_packing.STAGES)
def test_every_weight_has_one_warp(stage):
    rows, k, steps = expert_loop_packing.STAGES[stage]
    tiles, first = expert_loop_packing.shares(stage)
    active = expert_loop_packing.QKV_BLOCKS if stage == "qkv" else len(tiles)
    seen = torch.zeros(rows // 16, k // 16, dtype=torch.int64)
    for block in range(active):
        for warp in range(expert_loop_packing.WARPS):
            seen[tiles[block, warp], first[block, warp] : first[block, warp] + steps // expert_loop_packing.GROUPS] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("formats", [HYBRID, SEED, BF16, FP8], ids=["hybrid", "seed", "bf16", "fp8"])
@pytest.mark.parametrize("capacity", [610, 762, 1018])
def test_full_size_has_a_plan(formats, capacity):
    plan = expert_loop.plan_loop(50, capacity, formats, H100_LIMIT)
    assert plan is not None
    assert plan.slots >= 3
    assert plan.shared() + expert_loop.STATIC_BYTES <= H100_LIMIT


@pytest.mark.parametrize(("tokens", "capacity"), [(10, 610), (65, 700), (50, 2000), (50, 50)])
def test_what_does_not_fit_has_no_plan(tokens, capacity):
    assert expert_loop.plan_loop(tokens, capacity, HYBRID, H100_LIMIT) is None


@pytest.mark.slow
@nvcc
@pytest.mark.parametrize("capacity", [610, 762, 1018])
@pytest.mark.parametrize("formats", [HYBRID, BF16, FP8, SEED], ids=["hybrid", "bf16", "fp8", "seed"])
def test_machine_code(tmp_path, formats, capacity):
    """wgmma in flight (a serialised one waits for each product), the host's count of shared memory."""
    plan = expert_loop.plan_loop(50, capacity, formats, H100_LIMIT)
    macros = {"TOKENS": 50, "ACTIONS": 32, "MT": 56, "KEYS": plan.keys, "SLOTS": plan.slots, "PDL": 1, "TRACE": 0}
    macros["AHEAD"] = 64 if formats is BF16 else 32 if formats is FP8 else 0
    macros |= {f"FORMAT_{name.upper()}": expert_loop_packing.FORMATS[fmt] for name, fmt in formats.items()}
    sizes = {"SHARED": plan.shared(), "MAIL": plan.mail_words * 4, "PARCELS": plan.parcel_words * 4}
    counted = " ".join(f"static_assert({name} == {size});" for name, size in sizes.items())
    cubin = compiled(
        tmp_path, expert_loop.SOURCES, macros, epilogue=counted, most_stack=0 if formats in (BF16, FP8) else 200
    )  # three bodies of products
    # the form in which `overwritten_operands` looks for products with a register operand
    assert re.search(r"[HQ]GMMA\S* R\d+, R\d+, gdesc", disassembled(cubin))


def weight_of(fmt, n, k):
    dense = torch.randn(n, k, device="cuda") / math.sqrt(k)
    if fmt == "bf16":
        return dense.bfloat16()
    return nvfp4.quantize(dense, rule="max") if fmt == "nvfp4" else fp8.quantize(dense, per_row=False)


ACTIONS = 27


def build(formats, layers, steps, tokens, valid, capacity, growth=1.0):
    """A packed loop, and what it should give: (noise, guide) -> actions float64. growth: of attention's gates."""
    loop = expert_loop.ExpertLoop(layers, steps, tokens, ACTIONS, capacity, formats, torch.device("cuda"))
    keys = torch.randn(layers, capacity, 1, expert_loop_packing.HEAD_DIM, device="cuda").bfloat16()
    values = torch.randn_like(keys)
    keys[:, valid:], values[:, valid:] = math.nan, math.nan  # nobody may look there
    shapes = {
        "qkv": {"q": 2048, "k": 256, "v": 256},
        "o": {"o": 1024},
        "gate_up": {"gate": 4096, "up": 4096},
        "down": {"down": 1024},
    }
    reference = []
    for i in range(layers):
        dense = {}
        factors, shifts, gates = (
            tuple(offset + 0.3 * torch.randn(steps, 1024, device="cuda") for _ in range(2)) for offset in (1, 0, 0.7)
        )
        norms = {"qkv": (shifts[0], factors[0]), "gate_up": (shifts[1], factors[1])}
        for stage, rows in shapes.items():
            k = expert_loop_packing.STAGES[stage][1]
            weights = {name: weight_of(formats[stage], n, k) for name, n in rows.items()}
            loop.pack(i, stage, list(weights.values()), *norms.get(stage, ()))
            dense |= {name: expert.decoded(*expert.stack([w])) for name, w in weights.items()}
        gates[0][:] *= growth
        loop.modulate(i, factors, gates, values[i, :valid].abs().max().item())
        eight = (loop.seen_scale[i].item(), loop.act_scale[i].item()) if formats is FP8 else None

        def pick(pair, step):
            return pair[0][step], pair[1][step]

        reference.append(
            [
                ReferenceLayer(
                    **dense,
                    factors=pick(factors, s),
                    shifts=pick(shifts, s),
                    gates=pick(gates, s),
                    eight=eight,
                )
                for s in range(steps)
            ]
        )
    flow = FlowWeights(
        torch.randn(ACTIONS, 1024, device="cuda") / 32, torch.randn(ACTIONS, device="cuda"),
        torch.randn(1024, ACTIONS, device="cuda") / 5, torch.randn(1024, device="cuda"),
    )  # fmt: skip
    norm = 1 + 0.3 * torch.randn(steps, 1024, device="cuda"), 0.3 * torch.randn(steps, 1024, device="cuda")
    times, strengths = [1 - s / steps for s in range(steps)], [0.5 * (s + 1) for s in range(steps)]
    loop.set_flow(flow, norm, times, strengths)
    tables = rope_tables(capacity, expert_loop_packing.HEAD_DIM, torch.device("cuda"))

    def expected(noise, guide):
        x, h = noise.double(), torch.empty(tokens, 1024, dtype=torch.float64, device="cuda")
        wide = flow.double()
        target = Guide(guide.target.double(), guide.weights.double(), guide.clean)
        flow_step_reference(h, x, h, wide, target, 0.0, 0.0, 0.0, first=True)
        for s in range(steps):
            scale = torch.full_like(h[:, :1], loop.vectors[s, 0, -4].item()) if formats is FP8 else None
            for i in range(layers):
                prefix = keys[i, :valid].double(), values[i, :valid].double()
                h = layer_reference(h, reference[i][s], *prefix, tables, scale=scale)
            root = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
            normed = h * root * norm[0][s].double() + norm[1][s].double()
            flow_step_reference(normed, x, h, wide, target, times[s], 1 / steps, strengths[s])
        return x

    def run(noise, guide):
        actions, start = torch.full_like(noise, math.nan), torch.tensor([valid], dtype=torch.int32, device="cuda")
        loop.start()
        loop(noise, actions, guide, keys, values, start, tables)
        return actions

    return run, expected


@pytest.mark.parametrize("formats", [HYBRID, BF16, FP8], ids=["hybrid", "bf16", "fp8"])
@pytest.mark.parametrize(("tokens", "valid", "capacity"), [(50, 560, 610), (16, 3, 610), (64, 900, 1010)])
class TestLoop:
    pytestmark = on_hopper

    def test_three_steps_of_two_layers(self, formats, tokens, valid, capacity):
        torch.manual_seed(0)
        run, expected = build(formats, 2, 3, tokens, valid, capacity)
        noise = torch.randn(tokens, ACTIONS, device="cuda")
        ramp = torch.linspace(1, 0, tokens, device="cuda")
        target = torch.randn_like(noise)
        for weights, clean in ((0 * ramp, 0), (ramp, 0), (ramp, 5)):
            guide = Guide(target, weights, torch.tensor([clean], dtype=torch.int32, device="cuda"))
            moved = expected(noise, guide) - noise
            results = [run(noise, guide) for _ in range(3)]
            # a value beside a border of E4M3 may fall to either side
            assert ((results[0] - noise - moved).norm() / moved.norm()).item() < (2e-2 if formats is FP8 else 6e-3)
            assert all(torch.equal(results[0], again) for again in results)
            assert torch.equal(results[0][:clean], target[:clean])
        noise[1, 5] = math.nan  # goes to that token, and to those that attend to it: all
        free = Guide(target, 0 * ramp, torch.tensor([0], dtype=torch.int32, device="cuda"))
        assert run(noise, free).isnan().all()


def test_no_row_exceeds_its_bound():
    torch.manual_seed(0)
    weight, factor = torch.randn(64, 128) * torch.rand(64, 1), 1 + 0.3 * torch.randn(3, 128)
    shift = 0.3 * torch.randn(3, 128)
    bounds = expert_loop.row_bounds(weight, factor, shift)
    assert bounds.shape == (64, 3)
    x = torch.cat((torch.randn(200, 128), torch.eye(128), weight))
    x = x * (128**0.5 / x.norm(dim=1, keepdim=True))
    for step in range(3):
        tight = weight * factor[step]
        tight = tight * (128**0.5 / tight.norm(dim=1, keepdim=True))  # where each row is largest
        rows = torch.cat((x, x * torch.sign(factor[step]), tight)) * factor[step] + shift[step]
        largest = (rows @ weight.T).abs().amax(0)
        assert (largest <= bounds[:, step]).all()
        assert (largest >= 0.5 * bounds[:, step]).any()


class TestEdges:
    pytestmark = on_hopper

    @pytest.mark.parametrize(("growth", "holds"), [(3.0, True), (1e5, False)])
    def test_a_stream_that_outgrows_e4m3_becomes_nan(self, growth, holds):
        """Between two norms; what saturated instead would be a number that nobody doubts."""
        torch.manual_seed(0)
        run, expected = build(FP8, 2, 1, 16, 30, 60, growth)
        noise = torch.randn(16, ACTIONS, device="cuda")
        still = torch.zeros(16, device="cuda")
        guide = Guide(torch.zeros_like(noise), still, torch.zeros(1, dtype=torch.int32, device="cuda"))
        actions = run(noise, guide)
        if holds:
            moved = expected(noise, guide) - noise
            assert ((actions - noise - moved).norm() / moved.norm()).item() < 4e-2
        else:
            assert actions.isnan().all()

    def test_a_wrong_weight_is_refused(self):
        loop = expert_loop.ExpertLoop(1, 1, 50, 32, 610, BF16, torch.device("cuda"))
        with pytest.raises(InputError, match=r"layers\.0\.o"):
            loop.pack(0, "o", [torch.zeros(1024, 1024, device="cuda").bfloat16()])
