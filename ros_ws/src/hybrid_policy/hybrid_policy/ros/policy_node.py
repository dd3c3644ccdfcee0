"""policy_node: sensor topics in, action chunks out, at a fixed frequency; a managed (lifecycle) node.

configure: check the robot file and the checkpoint, load, quantise, capture, warm up. activate: command
from the first complete observation on. deactivate: hold. cleanup: free the GPU. An error on the way ends
in a state that says so, with the robot held. ``~/pause`` (std_srvs/SetBool), ``~/reset``
(std_srvs/Trigger), ``~/status`` (std_msgs/String), ``/diagnostics``. See docs/parameters.md, docs/safety.md.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from hybrid_policy.control.cycle import ControlCycle, CycleResult
from hybrid_policy.control.latency import LatencyRecorder
from hybrid_policy.control.observation_buffer import ObservationBuffer
from hybrid_policy.control.robot_file import RobotFile, check_fit
from hybrid_policy.control.watchdog import ClockMonitor, Watchdog
from hybrid_policy.errors import InputError
from hybrid_policy.models.observation import Policy
from hybrid_policy.ros import parameters, real_time, settings
from hybrid_policy.ros.control_loop import ControlLoop
from hybrid_policy.ros.diagnostics import Diagnostics, engine_values, idle_status, shadow_status, status_line
from hybrid_policy.ros.inputs import Inputs, await_robot_description
from hybrid_policy.ros.log import ThrottledLog, summarise
from hybrid_policy.ros.outputs import make_output
from hybrid_policy.ros.policy_loading import find_checkpoint, load_policy, warm_up
from hybrid_policy.ros.shadow import ShadowCheck
from hybrid_policy.share import resolve

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
#: How much faster than the steady clock simulated time may run before that counts as a jump.
FASTEST_SIMULATION = 10.0
#: Seconds after its topic is opened before a node may command: whoever opened it at the same moment is then known.
OPENED_TIME = 1.0


class PolicyNode(LifecycleNode):
    """The node. A subclass may override :meth:`make_policy`, e.g. to run another kind of policy.

    Raises:
        InputError: a parameter or the robot file is not what it must be (before any topic is opened).
    """

    def __init__(self) -> None:
        super().__init__("policy_node")
        self.reports = ThrottledLog(self.get_logger())
        self.problem = ""
        self.failed = threading.Event()
        self._policy: Policy | None = None
        self._loop: ControlLoop | None = None
        self._shadow: ShadowCheck | None = None
        self._switch_recipe = False
        self._inputs: Inputs | None = None
        self._joined, self._opened = time.monotonic(), 0.0
        self._recorder: LatencyRecorder | None = None
        try:
            parameters.declare(self)
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise InputError(f"parameter: {error}") from None
        self.values = parameters.values(self)
        self.robot = RobotFile.load(resolve(self.values["robot"], "config/robots"))
        find_checkpoint(self.values["checkpoint"])
        self.recipe: str = self.values["recipe"]
        self.add_on_set_parameters_callback(self._on_parameters)
        self._status = self.create_publisher(String, "~/status", QoSProfile(depth=1))
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=5))
        self.create_service(SetBool, "~/pause", self._on_pause)
        self.create_service(Trigger, "~/reset", self._on_reset)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0, self._report, clock=steady)
        self.create_timer(0.5, self._look_around, clock=steady)

    def now(self) -> int:
        """Nanoseconds of the clock that stamps are held against (ROS time)."""
        return int(self.get_clock().now().nanoseconds)

    def make_policy(self, recipe: str) -> Policy:
        """The policy that runs: the checkpoint of the parameters, with this recipe."""
        return load_policy(self.values, self.robot, recipe, self.get_logger().warning)

    # Lifecycle

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Check, load, quantise, capture, warm up, open the topics."""
        del state
        try:
            self._configure()
        except InputError as error:
            return self._refused(str(error))
        except Exception as error:
            return self._refused(f"configure: {type(error).__name__}: {error}")
        self.problem = ""
        return SUCCESS

    def _configure(self) -> None:
        self.values = values = parameters.values(self)
        self.robot = RobotFile.load(resolve(values["robot"], "config/robots"))
        if self.robot.robot_description_topic:
            self.robot = await_robot_description(self, self.robot)
        self.recipe = values["recipe"]
        policy = self.make_policy(self.recipe)
        check_fit(self.robot, policy.spec)
        warm_up(policy, self.robot)
        self._policy = policy
        if values["shadow.every"] > 0:
            shadow = self.make_policy(values["shadow.recipe"])
            warm_up(shadow, self.robot)
            self._shadow = ShadowCheck(
                shadow, values["shadow.every"], values["shadow.threshold"], self._on_shadow_below
            )
        limits = settings.thresholds(values)
        self._diagnose = Diagnostics(self._name(), self.robot.name, limits)
        cameras = self.robot.policy_cameras(policy.spec)
        buffer = ObservationBuffer(self.robot, cameras, values["joint_margin"])
        if values["prompt"].strip():
            buffer.set_prompt(values["prompt"])
        self._output = make_output(self, self.robot, policy.spec.horizon, values["dry_run"])
        self._opened = time.monotonic()
        self._recorder = LatencyRecorder(settings.log_path(values["latency_log"], self.get_name()))
        if self._recorder.error:
            self.reports.error("log", f"latency_log: {self._recorder.error}; going on without it")
        self._inputs = Inputs(self, self.robot, buffer, cameras, self.reports)
        self.get_logger().info(
            f"configured: {self.robot.name}, checkpoint {policy.spec.name}, recipe {self.recipe}, "
            f"{getattr(policy, 'description', type(policy).__name__)}"
        )

    def _make_loop(self, policy: Policy, buffer: ObservationBuffer) -> ControlLoop:
        values = self.values
        assert self._recorder is not None
        cycle = ControlCycle(self.robot, policy, settings.cycle_settings(values))
        simulated = self.get_parameter("use_sim_time").value
        return ControlLoop(
            cycle,
            buffer,
            self._output,
            Watchdog(self.robot.timeouts, values["output_timeout"], values["future_tolerance"]),
            settings.loop_settings(values, self.robot),
            clock=self.now,
            clock_monitor=ClockMonitor(fastest=FASTEST_SIMULATION if simulated else 1.0),
            recorder=self._recorder,
            reports=self.reports,
            on_chunk=self._on_chunk,
            on_failed=self._on_failed,
        )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start both threads; the first command follows the first complete observation."""
        if self._policy is None or self._inputs is None:
            return self._refused("activate: not configured")
        if self.values["rt.mlockall"]:
            real_time.lock_memory(lambda text: self.reports.warn("mlockall", text))
        if self.values["rt.freeze_gc"]:
            real_time.freeze_garbage()
        real_time.use_switch_interval(self.values["rt.switch_interval"])
        self.failed.clear()
        self._loop = self._make_loop(self._policy, self._inputs.buffer)
        self._look_around()
        self._loop.start()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold, and stop both threads."""
        self._stop_loop("deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Close the topics and give the policy's memory back."""
        self._release("cleaned up")
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Hold and release everything."""
        self._release("shut down")
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """An error in a transition: hold, release, back to unconfigured."""
        self.problem = self.problem or "an error in a transition; see the log"
        self._release("error")
        return super().on_error(state)

    def finish(self) -> None:
        """Hold and release everything, from whatever state."""
        if str(self._state_machine.current_state[1]) in ("unconfigured", "inactive", "active"):
            self.trigger_shutdown()
        else:
            self._release("interrupted")

    def _refused(self, reason: str) -> TransitionCallbackReturn:
        self.problem = reason
        self.get_logger().error(reason)
        self._release("refused")
        return FAILURE

    def _stop_loop(self, reason: str) -> None:
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        if not loop.stop(reason):
            self.reports.error("stop", f"inference has not come back for {loop.inferring_seconds():.1f} s")
        loop.output.flush()

    def _release(self, reason: str) -> None:
        self._stop_loop(reason)
        if self._inputs is not None:
            self._inputs.close()
            self._output.close()
            self._inputs = None
        for engine in (self._policy, self._shadow.policy if self._shadow is not None else None):
            if engine is not None and hasattr(engine, "close"):
                engine.close()
        if self._shadow is not None:
            self._shadow.close()
        self._policy, self._shadow = None, None
        if self._recorder is not None:
            summarise(self._recorder, self.values["summary_json"], self.get_logger())
            self._recorder.close()
            self._recorder = None

    # From the loop's threads

    def _on_chunk(self, result: CycleResult) -> None:
        if self._shadow is None or self._loop is None or result.trajectory is None:
            return
        if self._switch_recipe:
            self._switch_recipe = False
            self._shadow.close()
            self._loop.cycle.policy = self._shadow.policy
            self.recipe = self.values["shadow.recipe"]
            self.reports.error("switch", f"shadow check: going on with the recipe {self.recipe}")
        elif self._loop.cycle.policy is not self._shadow.policy:
            self._shadow.offer(result)

    def _on_shadow_below(self, cosine: float) -> None:
        limit = self.values["shadow.threshold"]
        self.reports.warn("shadow", f"shadow check: action cosine {cosine:.5f}, expected at least {limit:g}")
        self._switch_recipe = bool(self.values["shadow.switch"])

    def _on_failed(self, reason: str) -> None:
        self.problem = reason
        self.failed.set()  # the executor's thread deactivates: a transition must not run in the loop's own

    # From the executor

    def _on_parameters(self, changed: Sequence[Parameter[Any]]) -> SetParametersResult:
        for one in changed:
            if one.name not in parameters.BY_NAME:
                continue
            try:
                parameters.check(one.name, one.value)
            except InputError as error:
                return SetParametersResult(successful=False, reason=str(error))
            if one.name == "prompt" and self._inputs is not None and one.value.strip():
                try:
                    self._inputs.buffer.receive_prompt(String(data=one.value))
                except InputError as error:
                    return SetParametersResult(successful=False, reason=str(error))
            elif parameters.BY_NAME[one.name].fixed and self._policy is not None:
                reason = f"{one.name}: read when the node is configured; clean up first"
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        response.success = self._loop is not None
        if self._loop is not None:
            self._loop.pause(request.data)
        response.message = "not active" if self._loop is None else self._loop.status.state
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        del request
        response.success = self._loop is not None
        if self._loop is not None:
            self._loop.reset()
        response.message = "not active" if self._loop is None else self._loop.status.state
        return response

    def _look_around(self) -> None:
        """Who else commands the robot, and has the loop given up."""
        self._let_a_chunk_leave()
        if self.failed.is_set() and self._loop is not None:
            self.failed.clear()
            self.get_logger().error(f"deactivating: {self.problem}")
            self.trigger_deactivate()
        if self._inputs is not None:
            self._inputs.look_for_latched_prompt()
        if self._loop is None or self.values["dry_run"]:
            return
        others = self.count_publishers(self._output.topic) - 1
        if others > 0:
            self._loop.contended = f"{self._output.topic}: {others} other publisher(s), expected none"
            self.reports.warn("contended", self._loop.contended)
        elif time.monotonic() < max(self._joined + self.values["discovery_time"], self._opened + OPENED_TIME):
            self._loop.contended = f"{self._output.topic}: looking for other publishers"
        else:
            self._loop.contended = ""

    def _let_a_chunk_leave(self) -> None:
        """Both threads want the interpreter, and timers of whole periods meet the same chunk again and again."""
        if self._loop is not None:
            self._loop.yield_to_chunk(0.05)

    def _report(self) -> None:
        """Diagnostics and ``~/status``, once a second."""
        self._let_a_chunk_leave()
        now, loop = self.now(), self._loop
        state = str(self._state_machine.current_state[1])
        if loop is None or self._policy is None:
            diagnose = Diagnostics(self._name(), self.robot.name, {})
            self._diagnostics.publish(diagnose.array(now, [idle_status(state, self.problem)]))
            self._status.publish(String(data=f"{state}: {self.problem}" if self.problem else state))
            return
        statuses = self._diagnose.statuses(loop, now, engine_values(loop.cycle.policy, self.recipe))
        if self._shadow is not None:
            statuses.append(shadow_status(self._shadow.report))
        self._diagnostics.publish(self._diagnose.array(now, statuses))
        self._status.publish(String(data=status_line(loop)))

    def _name(self) -> str:
        return str(self.get_fully_qualified_name()).lstrip("/")


def spin(node: PolicyNode) -> int:
    """Run until SIGINT or SIGTERM (a second one changes nothing); hold, summarise, exit code."""
    stop = threading.Event()
    loading = True

    def interrupted(number: int, frame: Any) -> None:
        if loading and not stop.is_set():
            stop.set()
            raise KeyboardInterrupt  # loading may take minutes; nothing moves yet
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    code = 0
    try:
        if node.values["autostart"]:
            ready = node.trigger_configure() == SUCCESS and node.trigger_activate() == SUCCESS
            code = 0 if ready else 2
        loading = False
        while not stop.is_set() and code == 0:
            try:
                executor.spin_once(timeout_sec=0.1)
            except ExternalShutdownException:
                break
            except Exception as error:  # a message that cannot even be unpacked must not end the node
                node.reports.error("callback", f"dropped: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        code = 130
    finally:
        loading = False
        for number in (signal.SIGINT, signal.SIGTERM):
            # A launched node gets a second one. Ignored for good: Python takes its own handlers away when it
            # ends, and one that comes then would kill the process.
            signal.signal(number, signal.SIG_IGN)
        node.finish()
        executor.shutdown()
        node.destroy_node()
    return code


def main(node_class: type[PolicyNode] = PolicyNode) -> int:
    """Start the node; exit code 2 for bad input. ``node_class``: PolicyNode or a subclass."""
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = node_class()
    except InputError as error:
        print(error, file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    code = spin(node)
    rclpy.try_shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
