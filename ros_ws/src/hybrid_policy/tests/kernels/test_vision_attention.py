"""Vision's attention in CUDA C++: its plans, its machine code, and on a GPU its results against float64."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import tensor_map, vision_attention
from hybrid_policy.kernels.vision_attention import AttentionPlan, plan_attention

from .devices import on_hopper
from .machine_code import compiled, disassembled, instructions_and_loops, nvcc

#: a multiprocessor's shared memory, and what each block on it takes beside its own
SHARED, RESERVED = 228 * 1024, 1024


def test_which_vision_attention_fits():
    fits = vision_attention.fits
    assert fits((9, 0), 256, 72)
    assert not fits((9, 0), 16, 72)
    assert not fits((9, 0), 576, 72)
    assert not fits((8, 9), 256, 72)
    assert not fits((9, 0), 256, 128)


@pytest.mark.parametrize("tokens", [64, 128, 192, 256])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96])
@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("processors", [132, 114])
def test_plans_are_whole(tokens, head_dim, views, processors):
    plan = plan_attention(views, 16, tokens, head_dim, processors)
    assert tokens % (64 * plan.tiles) == 0
    assert tokens // 64 // plan.tiles % plan.cluster == 0
    assert tokens % plan.part == 0
    assert plan.blocks(views, 16) * 64 * plan.tiles == views * 16 * tokens
    assert plan.tiles == 2 or tokens // 64 % 2 or 2 * plan.blocks(views, 16) <= processors
    assert plan.shared + RESERVED + 4096 <= SHARED


CODE = [
    plan_attention(2, 16, 256, 72),
    plan_attention(3, 16, 256, 72),
    AttentionPlan(256, 72, 1, 1, 128),
    AttentionPlan(256, 72, 1, 2, 128),
    AttentionPlan(256, 72, 2, 2, 128),
    plan_attention(1, 2, 192, 40),
    plan_attention(1, 2, 64, 64),
]


@nvcc
@pytest.mark.parametrize("plan", CODE, ids=str)
@pytest.mark.parametrize("quantise", [True, False])
def test_machine_code(tmp_path, plan, quantise):
    macros = plan.macros(16, quantise=quantise, pdl=True)
    prelude = vision_attention.step_source(plan.part)
    cubin = compiled(tmp_path, vision_attention.SOURCES, macros, prelude=prelude)
    instructions, _ = instructions_and_loops(disassembled(cubin))
    if plan.tokens // plan.part != 2:
        return
    # between the values of a warpgroup's two parts: the second's softmax, and only then the wait for what the first's
    # values make (the assembler would put the wait first, see softmax_part)
    places = [i for i, text in enumerate(instructions) if "GMMA" in text and "tnspB" in text]
    ((first, last),) = [(a, b) for a, b in pairwise(places) if b - a > 200]
    waits = [i for i in range(first, last) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in instructions[i]]
    softmax = [i for i in range(first, last) if "MUFU.EX2" in instructions[i]]
    assert softmax[-1] < waits[-1]


@pytest.mark.parametrize(("head_dim", "columns"), [(72, 64), (72, 16), (40, 16)])
def test_what_a_box_reads_beyond_its_head_is_none_of_the_next(monkeypatch, head_dim, columns):
    made = []
    monkeypatch.setattr(tensor_map, "_encode", lambda *arguments: made.append(arguments) or b"")
    qkv = torch.empty(128, 3 * 2 * head_dim, dtype=torch.bfloat16)
    tensor_map.heads_map(qkv, head_dim, 64, columns)
    address, dtype, shape, strides, box, swizzle = made[0]
    assert (address, dtype, shape) == (qkv.data_ptr(), torch.bfloat16, (head_dim, 128, 6))  # the engine's bounds
    assert strides == (qkv.stride(0) * 2, head_dim * 2)
    assert all(stride % 16 == 0 for stride in strides)
    assert (box, swizzle) == ((columns, 64, 1), 2 * columns)


def random_qkv(views, heads, tokens, head_dim):
    return torch.randn(views * tokens, 3 * heads * head_dim, dtype=torch.bfloat16, device="cuda") * 1.5


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


FORMS = ((None, torch.bfloat16, 6e-3, False), (0.02, torch.float8_e4m3fn, 4e-2, True))


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [(256, 16, 72), (256, 2, 64), (256, 1, 80), (192, 3, 72), (192, 2, 40), (128, 2, 96), (64, 2, 80)],
)
class TestVisionAttention:
    pytestmark = on_hopper

    @pytest.fixture
    def attention(self, monkeypatch, tokens, head_dim, tiles):
        torch.manual_seed(0)
        monkeypatch.setattr(vision_attention, "SPIN_LIMIT", 1 << 22)
        empty = torch.empty

        def poisoned(*shape, **options):
            out = empty(*shape, **options)
            out.view(torch.uint8).fill_(0xFF)  # NaN in both formats
            return out

        monkeypatch.setattr(torch, "empty", poisoned)
        plan = plan_attention(1 if tiles == 1 else 100, 16, tokens, head_dim)
        if plan.tiles != tiles:
            pytest.skip("an odd number of tiles")
        return partial(vision_attention.vision_attention, plan=plan)

    @pytest.mark.parametrize("views", [1, 2, 3])
    def test_agrees_with_float64(self, attention, views, tokens, heads, head_dim):
        qkv = random_qkv(views, heads, tokens, head_dim)
        expected = vision_attention.vision_attention_reference(qkv.double(), heads, tokens, None)
        for scale, dtype, bound, pdl in FORMS:
            out = attention(qkv, heads, tokens, scale, pdl=pdl)
            assert out.dtype == dtype
            assert relative(out.double() * (scale or 1.0), expected) < bound
            again = attention(qkv, heads, tokens, scale, pdl=pdl)
            assert torch.equal(out.view(torch.uint8), again.view(torch.uint8))

    @pytest.mark.parametrize("views", [1, 3])
    def test_what_is_no_number_stays_with_what_depends_on_it(self, attention, views, tokens, heads, head_dim):
        width = heads * head_dim
        of_view, of_head = slice(0, tokens), slice(0, head_dim)
        # a query: its row of its head; a key: its head's whole view; a value: its column of that
        for column, rows, columns in (
            (0, slice(5, 6), of_head),
            (width, of_view, of_head),
            (2 * width + 1, of_view, slice(1, 2)),
        ):
            qkv = random_qkv(views, heads, tokens, head_dim)
            qkv[5, column] = float("nan")
            for scale, _, _, pdl in FORMS:
                bad = attention(qkv, heads, tokens, scale, pdl=pdl).float().isnan()
                assert bad[rows, columns].all()
                assert int(bad.sum()) == bad[rows, columns].numel()

    def test_large_scores_in_either_part(self, attention, tokens, heads, head_dim):
        # a row's maximum rises from the first part to the second, or does not, by more than a float's exponents
        qkv = random_qkv(1, heads, tokens, head_dim)
        width = heads * head_dim
        for row in (3, tokens - 3):
            ill = qkv.clone()
            ill[row, width : 2 * width] *= 300
            expected = vision_attention.vision_attention_reference(ill.double(), heads, tokens, None)
            for scale, _, bound, pdl in FORMS:
                out = attention(ill, heads, tokens, scale, pdl=pdl)
                assert relative(out.double() * (scale or 1.0), expected) < bound


def test_inputs_of_other_shapes_are_refused():
    with pytest.raises(InputError, match="vision_attention"):
        vision_attention.vision_attention(torch.empty(100, 216), 1, 64, None)
