"""Tile choice is a pure function within each target's means; the doctor says what loading will do."""

import argparse
import json

import pytest
import torch
from hybrid_policy.errors import InputError
from hybrid_policy.kernels import capability, doctor_command, nvfp4, tiles
from hybrid_policy.kernels.capability import Machine
from hybrid_policy.kernels.linear import prepare
from hybrid_policy.kernels.w4a4 import W4A4Linear

SHAPES = [(64, 64), (512, 256), (8192, 1024), (1024, 4096), (2560, 1024), (32768, 2048), (2048, 16384)]


@pytest.mark.parametrize("target", sorted(tiles.SHARED_MEMORY))
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "nvfp4"])
def test_every_tile_fits_its_target(fmt, target):
    for m in (1, 7, 16, 50, 64, 100, 560, 968):
        for n, k in SHAPES:
            for tile in (tiles.gate_up_tile(fmt, m, n, k, target), tiles.linear_tile(fmt, m, n, k, target)):
                assert tiles.shared_bytes(tile, fmt) <= tiles.SHARED_MEMORY[target], (m, n, k, tile)
                assert not tile.swap or tile.bk >= 128  # see tiles.fit
                assert tile.split == 1 or (k % (tile.split * tile.bk) == 0 and tile.bm >= tile.split)
                assert tile.split == 1 or tile.programs(m, n) <= tiles.MULTIPROCESSORS.get(target, 128)
                assert (target == 90) or not (tile.tma_x or tile.tma_w)


def test_the_measured_shapes_take_the_measured_tiles():
    expert = tiles.gate_up_tile("nvfp4", 50, 8192, 1024, 90)
    assert (expert.bn, expert.bk, expert.warps, expert.swap) == (64, 256, 4, True)
    assert expert.programs(50, 8192) == 128
    down = tiles.linear_tile("fp8", 50, 1024, 4096, 90)
    assert (down.bn, down.bk, down.split, down.trigger) == (64, 512, 8, 1)
    many = tiles.gate_up_tile("nvfp4", 560, 32768, 2048, 90)
    assert many.bm + many.bm2 == 192  # 3 x 192 = 576 computed tokens
    assert tiles.gate_up_tile("nvfp4", 968, 32768, 2048, 90).bm == 256  # 4 x 256 = 1024


def test_routes_follow_the_shape():
    assert tiles.route("nvfp4", 968, 32768, 2048, 90) == "stream"
    assert tiles.route("fp8", 968, 32768, 2048, 90) == "library"
    assert tiles.route("fp8", 968, 32768, 2040, 90) == "stream"
    assert tiles.route("bf16", 50, 1024, 1024, 90) == "stream"


def machine(number, known=(80, 89, 90, 100, 120)):
    return Machine("GPU", number, 100, 80.0, "2", "13.0", "3.6.0", "12.8", list(known))


@pytest.mark.parametrize(
    ("number", "available"),
    [
        (None, {"bf16", "fp8_w8a8", "nvfp4_w4a16", "nvfp4_w4a4"}),
        (75, set()),
        (80, {"bf16", "nvfp4_w4a16"}),
        (89, {"bf16", "fp8_w8a8", "nvfp4_w4a16"}),
        (90, {"bf16", "fp8_w8a8", "nvfp4_w4a16"}),
        (100, {"bf16", "fp8_w8a8", "nvfp4_w4a16", "nvfp4_w4a4"}),
        (110, set()),
    ],
)
def test_what_each_target_offers(number, available):
    routes = capability.routes(machine(number))
    assert {route.precision for route in routes if route.available} == available
    for route in routes:
        assert route.why
        if number is not None and 80 <= number < 110 and not route.available:
            assert "take nvfp4_w4a16" in route.why
        if number == 110:
            assert "sm_110" in route.why  # that ptxas does not know it


def test_loading_says_what_the_doctor_says():
    with pytest.raises(InputError, match=r"nvfp4_w4a4.*take nvfp4_w4a16 or fp8_w8a8"):
        W4A4Linear(nvfp4.quantize(torch.randn(32, 64)), None)
    with pytest.raises(InputError, match="precision"):
        prepare(torch.randn(32, 64), "int4")


def test_doctor_prints_a_table_and_json(capsys):
    parser = argparse.ArgumentParser()
    doctor_command.add_arguments(parser)
    assert doctor_command.run(parser.parse_args([])) == 0
    printed = capsys.readouterr().out
    assert "nvfp4_w4a16" in printed
    assert "CUTLASS on E2M1 x bf16" in printed
    assert doctor_command.run(parser.parse_args(["--json", "--need", "bf16"])) == 0
    assert {r["precision"] for r in json.loads(capsys.readouterr().out)["routes"]} == set(doctor_command.PRECISIONS)
    assert "no " in doctor_command.text(machine(80))
