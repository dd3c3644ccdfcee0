"""ros2 launch hybrid_policy replay.launch.py bag:=<bag>: a bag played through the real policy node."""

from hybrid_policy.ros import replay_bringup
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, ExecuteProcess, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node


def start(context):
    values = {
        argument.name: LaunchConfiguration(argument.name).perform(context) for argument in replay_bringup.ARGUMENTS
    }
    if not values["bag"]:
        raise RuntimeError("bag: nothing given, expected bag:=<folder or file>")
    node = replay_bringup.node(values)
    player = ExecuteProcess(cmd=replay_bringup.player(values), output="screen")
    return [
        Node(
            package="hybrid_policy",
            executable=node.executable,
            name=node.name,
            parameters=[*node.parameter_files, node.parameters],
            ros_arguments=["--log-level", node.log_level],
            additional_env=node.environment,
            output="screen",
            sigterm_timeout="10",
            sigkill_timeout="10",
        ),
        player,
        # The bag's end is the end: the node writes its summary when it is interrupted.
        RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[EmitEvent(event=Shutdown())])),
    ]


def generate_launch_description():
    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            **({"choices": list(argument.choices)} if argument.choices else {}),
        )
        for argument in replay_bringup.ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])
