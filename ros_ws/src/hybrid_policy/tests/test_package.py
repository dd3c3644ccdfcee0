"""What a ROS 2 installation relies on: package.xml, entry points, launch files and shipped files agree."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from hybrid_policy import __version__, cli
from hybrid_policy.errors import InputError
from hybrid_policy.ros import bringup
from hybrid_policy.share import resolve, share_path

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parents[2]
DEFAULTS = {argument.name: argument.default for argument in bringup.ARGUMENTS}


def setup_keywords() -> dict[str, object]:
    """The literal keywords of setup.py's call of setup()."""
    tree = ast.parse((PACKAGE / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    keywords = {}
    for keyword in call.keywords:
        try:
            keywords[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            continue
    return keywords


def test_one_version() -> None:
    manifest = ElementTree.parse(PACKAGE / "package.xml").getroot()
    assert manifest.findtext("version") == __version__ == setup_keywords()["version"]
    assert __version__ in (PACKAGE / "CHANGELOG.rst").read_text()
    assert manifest.findtext("export/build_type") == "ament_python"


def test_every_ros_module_is_declared() -> None:
    manifest = ElementTree.parse(PACKAGE / "package.xml").getroot()
    declared = {element.text for element in manifest.iter("exec_depend")}
    used = set()
    for path in (PACKAGE / "hybrid_policy" / "ros").rglob("*.py"):
        used |= set(
            re.findall(r"^\s*(?:from|import) (\w+_msgs|std_srvs|rclpy|rosgraph_msgs)\b", path.read_text(), re.M)
        )
    assert used
    assert used <= declared


def test_executables_are_modules_with_main() -> None:
    scripts = setup_keywords()["entry_points"]["console_scripts"]  # type: ignore[index]
    for script in scripts:
        _, target = (part.strip() for part in script.split("="))
        module, function = target.split(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, script
        assert spec.origin is not None
        defined = {n.name for n in ast.parse(Path(spec.origin).read_text()).body if isinstance(n, ast.FunctionDef)}
        assert function in defined, script
    executables = {script.split("=")[0].strip() for script in scripts}
    described = {node.executable for node in bringup.nodes({**DEFAULTS, "sim": "true"})}
    assert described <= executables


def test_commands_exist_and_teach() -> None:
    for name, (module, _) in cli.COMMANDS.items():
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{name}: {module}"
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text())
        assert ast.get_docstring(tree), f"{name} has no help"
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert {"add_arguments", "run"} <= functions, name


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from hybrid_policy import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_launch_arguments_are_described() -> None:
    needed = {"robot", "checkpoint", "recipe", "device", "sim", "namespace", "use_sim_time", "params_file"}
    assert needed | {"log_level", "autostart"} == set(DEFAULTS)
    for argument in bringup.ARGUMENTS:
        assert len(argument.description) > 10
        assert not argument.choices or argument.default in argument.choices


def test_launch_file_uses_the_same_description() -> None:
    tree = ast.parse((PACKAGE / "launch" / "robot.launch.py").read_text())
    names = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert {"bringup.ARGUMENTS", "bringup.nodes"} <= names


def installed(package: str) -> bool:
    """Not only a folder of that name, as the package's own launch/ is where tests run beside it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@pytest.mark.skipif(not installed("launch"), reason="launch is not installed (not on PyPI)")
def test_launch_file_loads() -> None:
    spec = importlib.util.spec_from_file_location("robot_launch", PACKAGE / "launch" / "robot.launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    declared = {getattr(e, "name", None) for e in module.generate_launch_description().entities}
    assert set(DEFAULTS) <= declared


def test_node_arguments_survive_the_command_line() -> None:
    node = bringup.NodeDescription("x", "n", {"a": 'quo"te\\', "b": True, "c": 2.5, "d": "1.0"}, ("p.yaml",), "/left/")
    arguments = node.ros_arguments()
    values = dict(a.split(":=", 1) for a in arguments if ":=" in a)
    assert yaml.safe_load(values["a"]) == 'quo"te\\'
    assert yaml.safe_load(values["b"]) is True
    assert yaml.safe_load(values["c"]) == 2.5
    assert yaml.safe_load(values["d"]) == "1.0"
    assert values["__ns"] == "/left"
    assert arguments[arguments.index("--params-file") + 1] == "p.yaml"


def test_simulated_robot_only_when_asked() -> None:
    assert [n.executable for n in bringup.nodes(DEFAULTS)] == ["policy_node"]
    both = bringup.nodes({**DEFAULTS, "sim": "true", "use_sim_time": "true"})
    assert [n.executable for n in both] == ["sim_robot_node", "policy_node"]
    assert both[0].parameters["publish_clock"] is True


def test_names_resolve_to_shipped_files(tmp_path: Path) -> None:
    assert resolve("sim_aloha", "config/robots") == share_path("config/robots/sim_aloha.yaml")
    own = tmp_path / "mine.yaml"
    own.write_text("name: mine\n")
    assert resolve(str(own), "config/robots") == own
    with pytest.raises(InputError, match=r"nobody: no such file.*sim_aloha"):
        resolve("nobody", "config/robots")


def test_every_dependency_is_pinned_once() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition("==")
            marker = rest.partition(";")[2].strip()
            assert (name, marker) not in pinned, line
            pinned[name.lower(), marker] = rest
    keywords = setup_keywords()
    extras = keywords["extras_require"]
    wanted = [*keywords["install_requires"], *(name for names in extras.values() for name in names)]  # type: ignore
    missing = {re.split(r"[<>=; ]", w)[0].lower() for w in wanted} - {name for name, _ in pinned}
    assert not missing
