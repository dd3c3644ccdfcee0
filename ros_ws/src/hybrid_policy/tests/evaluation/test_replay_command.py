"""The command from end to end: bags in, verdict, page, JSON, predictions out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hybrid_policy.cli import main
from hybrid_policy.evaluation.bag import open_bag
from hybrid_policy.evaluation.message_types import Decoder
from hybrid_policy.evaluation.report import FORM
from hybrid_policy.evaluation.summary import FIGURES


@pytest.fixture
def replay(stub, tmp_path, capsys):
    """Runs the command with the stub policy; (exit code, report, stdout, stderr)."""

    def run(*arguments, robot="sim_aloha", recipes=("exact",), output="out", page=False):
        arguments = arguments if page else (*arguments, "--no-html")
        given = [str(a) for a in arguments] + ["--robot", str(robot), "--policy", stub, "-o", str(tmp_path / output)]
        for recipe in recipes:
            given += ["--recipe", recipe]
        code = main(["replay", *given])
        told = capsys.readouterr()
        path = tmp_path / output / "report.json"
        return code, json.loads(path.read_text()) if path.exists() else None, told.out, told.err

    return run


def test_a_replay_ends_with_a_verdict_and_every_file(replay, sim_expert, tmp_path):
    code, report, out, _ = replay(sim_expert, recipes=("exact", "fine", "rough"), page=True)
    assert code == 0
    assert report["verdict"]["passed"] is True
    assert report["schema"] == "hybrid_policy.replay/1"
    assert report["bags"][0]["status"] == "replayed"
    rough, fine = report["summary"]["rough"], report["summary"]["fine"]
    assert rough["action_mae"] > 50 * fine["action_mae"] > 0.0
    assert 0.9 < rough["action_cosine"] < fine["action_cosine"] <= 1.0
    assert 0.0 < report["summary"]["exact"]["recorded_mae"] < rough["recorded_mae"] < 0.05
    assert "rough is within" in out
    for name in ("report.html", "report.json", "foxglove_layout.json", "bags/sim_expert/predictions/metadata.yaml"):
        assert (tmp_path / "out" / name).stat().st_size > 500


def test_two_replays_give_the_same_report_apart_from_what_was_measured(replay, sim_expert):
    reports = []
    for output in ("one", "two"):
        _, report, _, _ = replay(sim_expert, recipes=("exact", "rough"), output=output)
        assert report.pop("measured")["summary"]["rough"]["latency_p50"] > 0.0
        reports.append(json.dumps(report, sort_keys=True))
    assert reports[0] == reports[1]


def test_a_page_drawn_later_is_the_page_drawn_at_once(replay, sim_expert, tmp_path):
    """Whoever replays a bag draws it; where nobody has, the one who writes the page does."""
    drawn = tmp_path / "out" / "bags" / "sim_expert" / "section.html"
    replay(sim_expert)
    assert not drawn.exists()
    replay(sim_expert, page=True)  # the result is kept, the page is new
    assert not drawn.exists()
    later = (tmp_path / "out" / "report.html").read_text()
    assert later.count("<svg") > 5
    drawn.write_text("<p>as it was left</p>")
    replay(sim_expert, page=True)
    assert "<p>as it was left</p>" in (tmp_path / "out" / "report.html").read_text()
    replay(sim_expert, "--fresh", page=True)
    at_once = (tmp_path / "out" / "report.html").read_text()
    assert drawn.read_text() in at_once
    assert at_once.count("<svg") == later.count("<svg")


def test_the_report_has_the_form_that_is_documented(replay, sim_expert):
    _, report, _, _ = replay(sim_expert, "--fail-if", "holds>5", recipes=("exact", "rough"))

    def at(value, keys):
        if not keys:
            return [value]
        key, rest = keys[0], keys[1:]
        if key.endswith("[]"):
            return [found for one in value[key[:-2]] for found in at(one, rest)]
        if key.startswith("<"):
            return [found for one in value.values() for found in at(one, rest)]
        return at(value[key], rest)

    kinds = {"string": str, "boolean": bool, "object": dict, "integer": int, "number": (int, float),
             "number or null": (int, float, type(None))}  # fmt: skip
    for path, (kind, _) in FORM.items():
        for value in at(report, path.split(".")):
            assert isinstance(value, kinds[kind.split(" (")[0]]), path
    assert set(report["summary"]["exact"]) | {"latency_p50", "latency_p99"} == {f.name for f in FIGURES}
    assert "NaN" not in json.dumps(report)


def test_the_page_stands_by_itself(replay, sim_expert, tmp_path):
    replay(sim_expert, "--fail-if", "action_mae>1", recipes=("exact", "rough"), page=True)
    page = (tmp_path / "out/report.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)[^\"']+", page.replace("xlink:href", "href"))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"|<!DOCTYPE[^>]*>|<(cc|dc|rdf):[^>]*>', "", page)
    assert "<script" not in page
    assert page.count("<svg") >= 9
    assert page.count("data:image/jpeg") == 8  # two cameras at each of the four worst moments
    for text in ("Passed", "left_waist", "Worst moments", "Inputs", "rough"):
        assert text in page


@pytest.mark.parametrize(
    ("condition", "code"), [("action_cosine<0.9", 0), ("action_mae>1e-9", 1), ("skill<9", 1), ("fine:holds>0", 0)]
)
def test_a_condition_decides_the_exit_code(replay, sim_expert, condition, code):
    found, report, out, _ = replay(sim_expert, "--fail-if", condition, recipes=("exact", "fine"))
    assert found == code
    assert report["verdict"]["passed"] is (code == 0)
    assert ("FAILED" in out) is (code == 1)


def test_a_bad_bag_is_reported_and_the_others_are_kept(replay, sim_expert, tmp_path, two_joints):
    (tmp_path / "broken.mcap").write_bytes(b"rubbish" * 50)
    poor = two_joints(np.zeros((40, 2)), name="poor")
    code, report, _, err = replay(sim_expert, tmp_path / "broken.mcap", poor, page=True)
    assert code == 2
    assert [b["status"] for b in report["bags"]] == ["replayed", "failed", "inputs only"]
    assert "broken.mcap: not an mcap file" in report["bags"][1]["lacks"][0]
    assert any("camera base_0_rgb: no topic /camera_overhead/image_raw" in line for line in report["bags"][2]["lacks"])
    assert report["bags"][2]["joint_names"] == ["a", "b"]
    assert "broken: failed" in err
    assert report["summary"]["exact"]["chunks"] == report["bags"][0]["recipes"]["exact"]["chunks"]
    page = (tmp_path / "out/report.html").read_text()
    assert "What the policy could not be given" in page


def test_bags_in_parallel_give_what_bags_in_turn_do(replay, sim_expert, sim_humble):
    _, alone, _, _ = replay(sim_expert, sim_humble, output="alone")
    _, pool, _, _ = replay(sim_expert, sim_humble, "--jobs", 2, output="pool")
    alone.pop("measured"), pool.pop("measured")
    assert alone == pool


def test_a_worker_that_dies_is_one_failed_bag(replay, sim_expert):
    code, report, _, _ = replay(sim_expert, "--jobs", 2, recipes=("crash",))
    assert code == 2
    assert "BrokenProcessPool" in report["bags"][0]["lacks"][0]


def test_finished_bags_are_not_done_again(replay, sim_expert, tmp_path):
    replay(sim_expert)
    result = tmp_path / "out/bags/sim_expert/result.json"
    marked = json.loads(result.read_text())
    marked["notes"] = ["kept from before"]
    result.write_text(json.dumps(marked))
    _, report, _, _ = replay(sim_expert)
    assert report["bags"][0]["notes"] == ["kept from before"]
    _, report, _, _ = replay(sim_expert, "--delay", 0.2)  # other settings: done again
    assert report["bags"][0]["notes"] != ["kept from before"]
    result.write_text(json.dumps(marked))
    _, report, _, _ = replay(sim_expert, "--fresh")
    assert report["bags"][0]["notes"] != ["kept from before"]


@pytest.mark.slow
def test_bags_as_ray_tasks_give_the_same(replay, sim_expert, sim_humble, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's workers take the stub from there
    ray = pytest.importorskip("ray", reason="Ray is an extra (pip install 'hybrid_policy[ray]')")
    _, alone, _, _ = replay(sim_expert, sim_humble, output="alone")
    try:
        code, tasks, _, _ = replay(sim_expert, sim_humble, "--ray", output="ray")
    finally:
        ray.shutdown()
    assert code == 0
    alone.pop("measured"), tasks.pop("measured")
    assert alone == tasks


def test_without_ray_the_option_says_how_to_get_it(replay, sim_expert, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, _, err = replay(sim_expert, "--ray")
    assert code == 2
    assert "Ray is not installed" in err


def test_a_missing_extra_is_named(replay, sim_expert, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    code, _, _, err = replay(sim_expert, page=True)
    assert code == 2
    assert "matplotlib: not installed; pip install 'hybrid_policy[eval]'" in err
    assert replay(sim_expert)[0] == 0  # without the page nothing is missing


def test_inputs_only_needs_no_policy(replay, sim_expert, tmp_path):
    code, report, _, _ = replay(sim_expert, "--inputs-only", recipes=())
    assert code == 0
    assert report["bags"][0]["status"] == "inputs only"
    assert report["bags"][0]["tracking"]["mae"] > 0.0
    assert [i["role"] for i in report["bags"][0]["inputs"]] == [
        "camera base_0_rgb",
        "camera right_wrist_0_rgb",
        "joints",
    ]


def test_the_real_episode_is_converted_and_replayed(replay, g1, tmp_path):
    assert main(["convert", str(g1), str(tmp_path / "g1_episode"), "--robot", "g1"]) == 0
    code, report, _, _ = replay(tmp_path / "g1_episode", "--checkpoint", "g1", robot="g1", recipes=("exact", "rough"))
    assert code == 0
    one = report["bags"][0]
    assert one["recipes"]["exact"]["chunks"] == 75
    assert len(one["recipes"]["exact"]["against_recorded"]["joints"]) == 26
    # a policy that says to stay where it was when it last looked is a little worse than standing still
    assert -0.3 < report["summary"]["exact"]["skill"] < 0.0
    # and the operator's commands were ahead of the joints
    assert one["tracking"]["mae"] == pytest.approx(0.0201, abs=0.001)


def test_humbles_bag_is_replayed(replay, sim_humble):
    code, report, _, _ = replay(sim_humble)
    assert code == 0
    assert report["bags"][0]["recipes"]["exact"]["chunks"] == 8


def test_predictions_are_a_bag_that_plots(replay, sim_expert, robot, tmp_path):
    replay(sim_expert, recipes=("exact", "rough"))
    bag = open_bag(tmp_path / "out/bags/sim_expert/predictions")
    names = {"/replay/recorded", *(f"/replay/{r}/{t}" for r in ("exact", "rough") for t in ("chunk", "command"))}
    assert set(bag.topics) == names
    decoder = Decoder(bag.topics)
    last, chunks = 0, []
    for message in bag.messages():
        assert message.t_ns >= last
        last = message.t_ns
        if message.topic == "/replay/rough/chunk":
            chunks.append(decoder.decode(message))
    assert len(chunks) == bag.topics["/replay/rough/chunk"].count == 35
    assert chunks[0].joint_names == list(robot.command_names)
    assert chunks[0].points[3].time_from_start.nanosec == 150_000_000

    layout = json.loads((tmp_path / "out/foxglove_layout.json").read_text())
    panels = layout["configById"]
    used = re.findall(r'"((?:Plot|Image)![^"]+)"', json.dumps(layout["layout"]))
    assert sorted(used) == sorted(panels)
    images = [panel["imageMode"]["imageTopic"] for panel in panels.values() if "imageMode" in panel]
    assert images == ["/camera_overhead/image_raw/compressed", "/camera_right_wrist/image_raw/compressed"]
    paths = {p["value"].split(".")[0] for panel in panels.values() for p in panel.get("paths", [])}
    assert paths == {"/replay/recorded", "/replay/exact/command", "/replay/rough/command"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--rate", "0"], "inference_rate: 0.0 given"),
        (["--delay", "-1"], "--delay: -1.0 given"),
        (["--jobs", "0"], "--jobs: 0 given"),
        (["--remap", "a=b"], "--remap: 'a=b' given, expected FROM:=TO"),
        (["--fail-if", "speed>1"], "'speed' given, expected one of"),
        (["--latency-log", "none.jsonl"], "none.jsonl: not readable"),
        (["--cpu-threads", "-1"], "cpu_threads: -1 given"),
        (["--params-file", "none.yaml"], "none.yaml: not readable"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(replay, sim_expert, given, expected):
    code, report, _, err = replay(sim_expert, *given)
    assert (code, report) == (2, None)
    assert expected in err


@pytest.mark.parametrize("missing", ["robot", "bag", "checkpoint", "recipe"])
def test_files_that_are_not_there_are_named(missing, sim_expert, tmp_path, capsys):
    names = {"bag": str(sim_expert), "robot": "sim_aloha", "checkpoint": str(tmp_path), "recipe": "bf16"}
    names[missing] = "/nowhere/x"
    given = [names["bag"], "--robot", names["robot"], "--checkpoint", names["checkpoint"], "--recipe", names["recipe"]]
    assert main(["replay", *given, "-o", str(tmp_path / "out")]) == 2
    assert "/nowhere/x" in capsys.readouterr().err


def test_a_remapped_topic_is_replayed(replay, sim_expert, tmp_path, robot):
    text = (robot.path).read_text().replace("camera_overhead/image_raw", "front/image")
    (tmp_path / "other.yaml").write_text(text)
    code, report, _, _ = replay(sim_expert, robot=tmp_path / "other.yaml")
    assert code == 2
    assert (
        "camera base_0_rgb: no topic /front/image; image topics in the bag: /camera_overhead"
        in report["bags"][0]["lacks"][0]
    )
    code, report, _, _ = replay(
        sim_expert, "--remap", "front/image:=/camera_overhead/image_raw/compressed", robot=tmp_path / "other.yaml"
    )
    assert code == 0


def test_a_folder_of_bags_is_every_bag_in_it(replay, sim_humble, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(sim_humble, tmp_path / "many" / name)
    code, report, _, _ = replay(tmp_path / "many", "--json")
    assert code == 0
    assert [b["name"] for b in report["bags"]] == ["a", "b"]


def test_the_shipped_policy_does_what_the_expert_did(sim_expert, tmp_path):
    """The real engine, bf16 and the hybrid recipe, on the first two seconds of the expert's episode."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    threads = torch.get_num_threads()
    given = ["--robot", "sim_aloha", "--recipe", "bf16", "--recipe", "seed", "--device", "cpu", "--duration", "2"]
    conditions = "bf16:skill<0.9,recorded_mae>0.02,action_cosine<0.999,guard_refused>0,holds>0"
    out = tmp_path / "out"
    code = main(["replay", str(sim_expert), *given, "--fail-if", conditions, "--no-html", "-o", str(out)])
    torch.set_num_threads(threads)
    report = json.loads((out / "report.json").read_text())
    assert code == 0, report["verdict"]["line"]
    stages = report["measured"]["bags"]["sim_expert"]["latency"]["seed"]
    assert set(stages) == {"preprocess", "vision", "prefix", "denoise", "postprocess", "infer"}
