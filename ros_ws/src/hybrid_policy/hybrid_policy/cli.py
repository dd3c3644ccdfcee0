"""``hybrid-policy <command>``: a table of commands, each in the room that does the work.

A command's module has a docstring (its help), ``add_arguments(parser)`` and ``run(args) -> int``.
Only the module of the command given is imported, so ``--help`` is quick and needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from hybrid_policy import __version__
from hybrid_policy.errors import InputError

#: command -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("hybrid_policy.ros.up", "start the simulated robot and the policy node, show the latency live"),
    "inspect": ("hybrid_policy.models.inspect_command", "say what a checkpoint is and what it lacks"),
    "verify": ("hybrid_policy.models.verify_command", "run a checkpoint's golden cases and compare"),
    "quantize": ("hybrid_policy.runtime.quantize_command", "write a mixed-precision checkpoint by a recipe"),
    "tune": ("hybrid_policy.runtime.tune_command", "measure this device and write its fastest recipe"),
    "doctor": (
        "hybrid_policy.kernels.doctor_command",
        "say which route each precision takes on this machine",
    ),
    "evaluate": (
        "hybrid_policy.evaluation.evaluate_command",
        "success of a policy in the simulator, by recipe",
    ),
    "record": ("hybrid_policy.ros.record_command", "record a bag of a robot file's topics"),
    "replay": ("hybrid_policy.evaluation.replay_command", "replay bags through recipes and write a report"),
    "convert": ("hybrid_policy.evaluation.convert_command", "turn a LeRobot episode into a bag"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hybrid-policy",
        description="Run, check and judge a pi0.5-class policy with hybrid-precision kernels.",
        epilog="hybrid-policy <command> --help tells more.",
    )
    parser.add_argument("--version", action="version", version=f"hybrid_policy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    module = None
    for name, (path, summary) in COMMANDS.items():
        child = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = importlib.import_module(path)
            child.description = module.__doc__
            module.add_arguments(child)
    args = parser.parse_args(arguments)
    assert module is not None  # argparse has refused every other command
    try:
        return int(module.run(args))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
