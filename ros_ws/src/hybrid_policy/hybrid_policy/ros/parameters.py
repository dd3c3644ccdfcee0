"""Every parameter of the policy node: documented here once.

The node declares them from this table (with description and range), ``config/policy_node.yaml`` and
``docs/parameters.md`` are written from it by ``python -m hybrid_policy.ros.parameters``, and a test holds
the three together. Imports no rclpy until a node declares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_policy.errors import InputError

Value = bool | int | float | str | list[int]


@dataclass(frozen=True)
class Parameter:
    """One parameter. low, high: the range of a number, both included. fixed: read at configure only."""

    name: str
    default: Value
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    fixed: bool = True

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return " or ".join(self.choices)
        if self.low is not None:
            return f"{_kind(self.default)} from {self.low:g} to {self.high:g}"
        return _kind(self.default)


def _kind(value: Value) -> str:
    kinds = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list of integers",
    }
    return kinds[type(value)]


PARAMETERS = (
    Parameter("robot", "sim_aloha", "Robot file: a path, or the name of one that ships (config/robots)."),
    Parameter(
        "checkpoint",
        "shipped",
        "Checkpoint directory; `shipped`: the simulated robot's policy; `random`: small random weights.",
    ),
    Parameter("recipe", "bf16", "Precision recipe: a path, or the name of one that ships (config/recipes)."),
    Parameter("device", "auto", "Where the policy runs.", choices=("auto", "cpu", "cuda")),
    Parameter("cpu_threads", 1, "Threads of PyTorch on the CPU; 0: PyTorch's own choice.", low=0, high=256),
    Parameter("autostart", True, "Configure and activate at once, without a lifecycle manager."),
    Parameter("dry_run", False, "Publish commands on `~/preview` only; the robot gets none."),
    Parameter("prompt", "", "The task; empty: the robot file's. The prompt topic replaces it.", fixed=False),
    Parameter("inference_rate", 5.0, "Inferences per second, on absolute deadlines.", low=0.1, high=200.0),
    Parameter(
        "wait_for_images",
        True,
        "At each deadline, wait for the cameras' next images (about a camera period at most) before inferring.",
    ),
    Parameter(
        "chunking",
        "rtc",
        "How chunks follow each other: real-time chunking in the engine, temporal ensembling, or neither.",
        choices=("rtc", "ensemble", "off"),
    ),
    Parameter(
        "rtc.mode",
        "prior_corrected",
        "Real-time chunking: guided flow, its prior-corrected form, or `prefix` (trained for it).",
        choices=("guided", "prior_corrected", "prefix"),
    ),
    Parameter("rtc.schedule", "linear", "How its weights fall over the overlap.", choices=("exp", "linear")),
    Parameter("rtc.beta", 0.0, "Its largest guidance weight; 0: the number of flow steps.", low=0.0, high=1000.0),
    Parameter("rtc.prior_std", 0.2, "Spread of normalised actions, for prior_corrected.", 0.001, 10.0),
    Parameter("delay_window", 10, "Recent delays whose maximum is expected next.", low=1, high=1000),
    Parameter("ensemble_weight", 0.01, "m of temporal ensembling, exp(-m k), k = 0 the oldest.", 0.0, 10.0),
    Parameter("blend", 0.2, "Seconds over which a new chunk is faded in; 0: not at all.", 0.0, 2.0),
    Parameter("seed", 0, "Seed of the noise that the flow starts from.", low=0, high=2**31 - 1),
    Parameter(
        "latency_log",
        "auto",
        "JSON lines, one a chunk; `auto`: ~/.ros/hybrid_policy/latency-<node>-<pid>.jsonl; empty: none.",
    ),
    Parameter("summary_json", "", "File for the summary at exit, as JSON; empty: only printed."),
    Parameter(
        "discovery_time",
        4.0,
        "Seconds after its start before the node may command: DDS announces a process every 3 s, so another "
        "commander of the robot is known by then. Loading counts.",
        0.0,
        60.0,
    ),
    Parameter("output_timeout", 1.0, "Seconds without a new chunk after which the robot holds; 0: never.", 0.0, 60.0),
    Parameter("future_tolerance", 0.1, "Seconds by which a stamp may lie ahead of the clock.", 0.0, 10.0),
    Parameter(
        "joint_margin",
        0.5,
        "Share of a joint's range by which a reading may lie outside its limits; beyond: a sensor fault.",
        0.0,
        1.0,
    ),
    Parameter(
        "hold_tolerance",
        0.2,
        "rad (m): a hold keeps the last command if the robot is within this of it, else where it stands.",
        0.0,
        10.0,
    ),
    Parameter(
        "tracking_tolerance",
        0.6,
        "rad (m) between command and robot, for 0.5 s, that make the node hold at the robot; 0: never.",
        0.0,
        10.0,
    ),
    Parameter("max_errors", 3, "Failed inferences in a row after which the node deactivates.", low=1, high=1000),
    Parameter("rt.fifo_priority", 40, "SCHED_FIFO priority of the control thread alone; 0: none.", low=0, high=99),
    Parameter("rt.mlockall", False, "Lock the process's memory (needs room for all of it)."),
    Parameter("rt.freeze_gc", True, "Keep what is loaded out of Python's garbage collections."),
    Parameter("rt.switch_interval", 0.0005, "Python's thread switch interval (s); 0: leave it.", 0.0, 1.0),
    Parameter("rt.cpu_affinity", [-1], "Cores of the control thread; [-1]: any."),
    Parameter("diagnostics.rate_ratio", 0.8, "Warn when an input's rate is below this share of its rate.", 0.0, 1.0),
    Parameter("diagnostics.miss_ratio", 0.05, "Warn above this share of missed deadlines.", 0.0, 1.0),
    Parameter("diagnostics.seam_position", 0.35, "Warn above this seam (rad), before blending.", 0.0, 10.0),
    Parameter("shadow.every", 0, "Every how many chunks the shadow recipe runs beside; 0: never.", low=0, high=10**6),
    Parameter("shadow.recipe", "bf16", "The recipe that the chosen one is held against."),
    Parameter("shadow.threshold", 0.99, "Action cosine below which the shadow check warns.", -1.0, 1.0),
    Parameter("shadow.switch", False, "Below the threshold, go on with the shadow recipe."),
)

BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def check(name: str, value: object) -> Any:
    """The value, if the parameter may have it.

    Raises:
        InputError: another type, out of range, or not one of the choices.
    """
    parameter = BY_NAME[name]
    problem = InputError.at("parameter", name, value, parameter.expected)
    if isinstance(parameter.default, list):
        given = list(value) if hasattr(value, "__iter__") else None
        if given is None or not all(isinstance(v, int) for v in given):
            raise problem
        return given
    if type(value) is not type(parameter.default):
        raise problem
    if parameter.choices and value not in parameter.choices:
        raise problem
    low, high = parameter.low, parameter.high
    if low is not None and high is not None and not low <= value <= high:  # type: ignore[operator]
        raise problem
    return value


def declare(node: Any) -> None:
    """Declare every parameter on a node, with its description and range."""
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    for one in PARAMETERS:
        descriptor = ParameterDescriptor(description=one.description, additional_constraints=", ".join(one.choices))
        if one.low is not None and one.high is not None:
            if isinstance(one.default, float):
                descriptor.floating_point_range = [FloatingPointRange(from_value=one.low, to_value=one.high)]
            else:
                low, high = int(one.low), int(one.high)
                descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
        node.declare_parameter(one.name, one.default, descriptor)


def values(node: Any) -> dict[str, Any]:
    """Every parameter's value, checked. Raises InputError for the first that is not allowed."""
    return {one.name: check(one.name, node.get_parameter(one.name).value) for one in PARAMETERS}


def _yaml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def parameter_file() -> str:
    """The text of ``config/policy_node.yaml``: the defaults, as a ROS 2 parameter file."""
    lines = [
        "# Parameters of policy_node and their defaults, written by `python -m hybrid_policy.ros.parameters`",
        "# Copy it, keep the lines that you change, and pass it as params_file.",
        "/**:",
        "  ros__parameters:",
    ]
    group = ""
    for one in sorted(PARAMETERS, key=lambda p: "." in p.name):
        head, _, leaf = one.name.rpartition(".")
        if head != group:
            lines.append(f"    {head}:")
            group = head
        indent = "      " if head else "    "
        lines += [f"{indent}# {one.description} ({one.expected})", f"{indent}{leaf}: {_yaml(one.default)}"]
    return "\n".join(lines) + "\n"


def document() -> str:
    """The text of ``docs/parameters.md``."""
    lines = [
        "# Parameters of `policy_node`",
        "",
        "Written from `hybrid_policy/ros/parameters.py` by `python -m hybrid_policy.ros.parameters`. Besides",
        "these, the node takes ROS's own `use_sim_time`. Parameters are read when the node is configured;",
        "those marked *live* can be set while it runs.",
        "",
        "| parameter | default | values | meaning |",
        "|---|---|---|---|",
    ]
    for one in PARAMETERS:
        live = "" if one.fixed else " *Live.*"
        lines.append(f"| `{one.name}` | `{_yaml(one.default)}` | {one.expected} | {one.description}{live} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the parameter file and the page."""
    package = Path(__file__).resolve().parents[2]
    (package / "config" / "policy_node.yaml").write_text(parameter_file(), encoding="utf-8")
    page = package.parents[2] / "docs" / "parameters.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
