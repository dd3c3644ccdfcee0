"""The form of a robot file: which keys there are, their types, defaults and how they hang together."""

from __future__ import annotations

from hybrid_policy.control.robot_file import (
    ENCODINGS,
    INTERFACES,
    TWIST_AXES,
    Camera,
    Command,
    Convention,
    Gripper,
    Joint,
    RobotFile,
    Timeouts,
)
from hybrid_policy.control.strict_yaml import Section


def read_robot(top: Section) -> RobotFile:
    """Every section in turn; the first problem is raised as an InputError."""
    name = top.text("name")
    description, source = top.text("description", ""), top.text("source", "")
    cameras = _cameras(top)
    states = top.section("joint_states")
    states_topic, states_rate = states.text("topic"), states.number("rate", above=0.0)
    states.end()
    prompt = top.section("prompt", optional=True)
    prompt_topic, prompt_default = prompt.text("topic", "prompt"), prompt.text("default", "")
    prompt.end()
    urdf = top.section("robot_description", optional=True)
    urdf_topic = urdf.text("topic", "robot_description" if "robot_description" in top else "")
    urdf.end()
    joints = _joints(top, limits_elsewhere=bool(urdf_topic))
    joint_names = [joint.name for joint in joints]

    policy = top.section("policy")
    command_section = top.section("command")
    interface = command_section.text("interface", choices=INTERFACES)
    rate = policy.number("rate", above=0.0)
    state = policy.names("state", choices=joint_names)
    allowed = (*TWIST_AXES, "gripper") if interface == "twist" else tuple(joint_names)
    action = policy.names("action", choices=allowed)
    if interface == "twist" and not set(TWIST_AXES) <= set(action):
        raise policy.error("action", list(action), f"all of {', '.join(TWIST_AXES)} for a twist")
    conventions = _conventions(policy, "conventions", joint_names)
    action_conventions = _conventions(policy, "action_conventions", joint_names)
    policy.end()
    command = _command(command_section, interface, rate, action)
    timeouts = _timeouts(top, interface)
    top.end()
    return RobotFile(
        name=name,
        description=description,
        source=source,
        cameras=cameras,
        joints=joints,
        joint_states_topic=states_topic,
        joint_states_rate=states_rate,
        prompt_topic=prompt_topic,
        prompt=prompt_default,
        rate=rate,
        state_names=state,
        action_names=action,
        conventions=conventions,
        action_conventions=action_conventions,
        command=command,
        timeouts=timeouts,
        robot_description_topic=urdf_topic,
        path=top.source,
    )


def _conventions(policy: Section, key: str, joint_names: list[str]) -> dict[str, Convention]:
    """``conventions``, or ``action_conventions``: of actions, where states are scaled otherwise."""
    found = {}
    for joint, section in policy.section(key, optional=True).items():
        if joint not in joint_names:
            raise policy.error(f"{key}.{joint}", joint, f"one of the joints {', '.join(joint_names)}")
        scale = section.number("scale", 1.0)
        if scale == 0.0:
            raise section.error("scale", scale, "a number other than 0")
        found[joint] = Convention(section.number("offset", 0.0), scale)
        section.end()
    return found


def _cameras(top: Section) -> tuple[Camera, ...]:
    cameras: list[Camera] = []
    for section in top.sections("cameras"):
        camera = Camera(
            name=section.text("name"),
            topic=section.text("topic"),
            type=section.text("type", "image", choices=("image", "compressed")),
            rate=section.number("rate", above=0.0),
            encodings=section.names("encodings", ENCODINGS, choices=ENCODINGS),
            frozen_after=section.number("frozen_after", 1.0, least=0.0),
        )
        section.end()
        for other in cameras:
            if other.name == camera.name:
                raise section.error("name", camera.name, "each camera once")
            if other.topic == camera.topic:
                raise section.error("topic", camera.topic, "each topic once")
        cameras.append(camera)
    return tuple(cameras)


def _joints(top: Section, limits_elsewhere: bool) -> tuple[Joint, ...]:
    joints: list[Joint] = []
    for section in top.sections("joints"):
        name = section.text("name")
        if name in [joint.name for joint in joints]:
            raise section.error("name", name, "each joint once")
        for key in () if limits_elsewhere else ("min", "max", "max_velocity"):
            if key not in section:
                section.take(key, "a number")
        joint = Joint(
            name=name,
            min=section.number("min", None),
            max=section.number("max", None),
            max_velocity=section.number("max_velocity", None, above=0.0),
            max_acceleration=section.number("max_acceleration", None, above=0.0),
            max_jump=section.number("max_jump", None, above=0.0),
        )
        if joint.min is not None and joint.max is not None and joint.max <= joint.min:
            raise section.error("max", joint.max, f"a number above min ({joint.min:g})")
        section.end()
        joints.append(joint)
    return tuple(joints)


def _command(section: Section, interface: str, rate: float, action: tuple[str, ...]) -> Command:
    topic = section.text("topic")
    ticks = section.number("rate", rate, above=0.0)
    gripper = None
    if "gripper" in section:
        grip = section.section("gripper")
        gripper_topic = grip.text("topic")
        if interface == "twist":
            values = [grip.number(k, d) for k, d in (("open", 1.0), ("closed", 0.0))]
            values += [grip.number(k, d) for k, d in (("open_value", -1.0), ("closed_value", 1.0))]
            for first, second, key in ((0, 1, "closed"), (2, 3, "closed_value")):
                if values[first] == values[second]:
                    raise grip.error(key, values[second], "another number than for open")
            gripper = Gripper(gripper_topic, (), *values)
        elif interface == "forward_position":
            gripper = Gripper(gripper_topic, grip.names("joints", choices=action))
        else:
            raise section.error("gripper", gripper_topic, "no gripper topic with joint_trajectory (one message)")
        grip.end()
    elif interface == "twist" and "gripper" in action:
        raise section.error("gripper", None, "a mapping with its topic, since policy.action has a gripper")
    command = Command(interface, topic, ticks, gripper)
    if interface == "twist":
        command = Command(
            interface,
            topic,
            ticks,
            gripper,
            frame=section.text("frame", "base_link"),
            linear_scale=section.number("linear_scale", above=0.0),
            angular_scale=section.number("angular_scale", above=0.0),
            max_linear=section.number("max_linear", above=0.0),
            max_angular=section.number("max_angular", above=0.0),
        )
    section.end()
    return command


def _timeouts(top: Section, interface: str) -> Timeouts:
    section = top.section("timeouts")
    timeouts = Timeouts(
        camera=section.number("camera", above=0.0),
        joint_states=section.number("joint_states", above=0.0),
        skew=section.number("skew", above=0.0),
        action=section.text("action", "hold", choices=("hold", "zero", "none")),
    )
    if timeouts.action == "zero" and interface != "twist":
        raise section.error("action", "zero", f"hold or none (zero is a speed; {interface} commands positions)")
    section.end()
    return timeouts
