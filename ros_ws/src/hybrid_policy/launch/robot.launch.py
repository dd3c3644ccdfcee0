"""ros2 launch hybrid_policy robot.launch.py: the policy node and, with sim:=true, a simulated robot."""

from hybrid_policy.ros import bringup
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node


def start(context):
    values = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in bringup.ARGUMENTS}
    return [
        Node(
            package="hybrid_policy",
            executable=node.executable,
            name=node.name,
            namespace=node.namespace,
            parameters=[*node.parameter_files, node.parameters],
            ros_arguments=["--log-level", node.log_level],
            additional_env=node.environment,
            output="screen",
            # The policy node sends a hold command when it is interrupted; let it finish.
            sigterm_timeout="10",
            sigkill_timeout="10",
        )
        for node in bringup.nodes(values)
    ]


def generate_launch_description():
    declared = [
        DeclareLaunchArgument(
            argument.name,
            default_value=argument.default,
            description=argument.description,
            **({"choices": list(argument.choices)} if argument.choices else {}),
        )
        for argument in bringup.ARGUMENTS
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])
