"""The simulated robot: gym-aloha's bimanual ViperX in plain MuJoCo, with cubes and two cameras.

Joint names, order and units are those of ``config/robots/sim_aloha.yaml``: radians, and for a gripper
the travel of one finger in metres (both fingers are driven). Commands are position set-points of
gym-aloha's own actuators, whose gains and friction are left as they ship.
"""

from __future__ import annotations

import atexit
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_policy.errors import InputError
from hybrid_policy.sim.rendering import load_mujoco
from hybrid_policy.sim.scene import CUBE_HALF, JOINT_NAMES, Look, Scene

#: Seconds of one physics step.
TIME_STEP = 0.002
IMAGE_SIZE = 224
CAMERAS = ("base_0_rgb", "right_wrist_0_rgb")

#: The fingers' tip: this far along the gripper link's x axis (m).
TIP_OFFSET = 0.135

#: Diffuse colours of the lights [lights, 3], ambient and diffuse of the headlight [3].
Light = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]

_MASS = 0.05
# Explicit inertia of gym-aloha's cube: with the box's own (2e-5) the grasp chatters.
_INERTIA = 0.002
#: The overhead camera: eye and target (m), vertical field of view (degrees).
BASE_CAMERA = ((0.09, 0.13, 0.52), (0.09, 0.485, 0.03), 35.0)
_WRIST_EYE, _WRIST_TARGET, _WRIST_FOVY = (0.03, 0.0, 0.105), (0.15, 0.0, 0.0), 65.0


def asset_folder() -> Path:
    """gym-aloha's folder of MJCF and meshes, found without importing its environment.

    Raises:
        InputError: gym-aloha is not installed, or lacks the model.
    """
    spec = importlib.util.find_spec("gym_aloha")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("gym_aloha: not installed, expected its robot model (pip install --no-deps gym-aloha==0.1.5)")
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets"
    if not (folder / "bimanual_viperx_transfer_cube.xml").is_file():
        raise InputError(f"{folder}: no bimanual_viperx_transfer_cube.xml, expected gym-aloha 0.1.5's assets")
    return folder


def _look_at(eye: Sequence[float], target: Sequence[float], up: Sequence[float]) -> NDArray[np.float64]:
    """Rotation of a MuJoCo camera (x right, y up, looks along -z), as a quaternion [w, x, y, z]."""
    mujoco = load_mujoco()
    back = np.asarray(eye, np.float64) - np.asarray(target, np.float64)
    back /= np.linalg.norm(back)
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quaternion


def _build(cubes: int) -> Any:
    """gym-aloha's two arms and table with ``cubes`` free cubes and the two fixed cameras, compiled."""
    mujoco = load_mujoco()
    spec = mujoco.MjSpec.from_file(str(asset_folder() / "bimanual_viperx_transfer_cube.xml"))
    spec.delete(spec.body("box"))
    for key in list(spec.keys):
        spec.delete(key)
    world = spec.worldbody
    for index in range(cubes):
        body = world.add_body(name=f"cube{index}", pos=[0.1 * index, 0.5, CUBE_HALF])
        body.mass, body.ipos, body.inertia = _MASS, [0.0, 0.0, 0.0], [_INERTIA] * 3
        body.explicitinertial = True
        body.add_joint(name=f"cube{index}", type=mujoco.mjtJoint.mjJNT_FREE, frictionloss=0.01)
        body.add_geom(
            name=f"cube{index}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            size=[CUBE_HALF] * 3,
            condim=4,
            friction=[1.0, 0.005, 0.0001],
            solimp=[2.0, 1.0, 0.01, 0.5, 2.0],
            solref=[0.01, 1.0],
        )
    eye, target, fovy = BASE_CAMERA
    world.add_camera(name="base_0_rgb", pos=eye, quat=_look_at(eye, target, (0, 1, 0)), fovy=fovy)
    # gym-aloha's own wrist camera turns by 180 degrees when the gripper points down: this one is fixed.
    spec.body("vx300s_right/gripper_link").add_camera(
        name="right_wrist_0_rgb",
        pos=_WRIST_EYE,
        quat=_look_at(_WRIST_EYE, _WRIST_TARGET, (0, 0, 1)),
        fovy=_WRIST_FOVY,
    )
    spec.option.timestep = TIME_STEP
    # 124 frames/s against 16 with shadows and multisampling (one core, software rendering).
    spec.visual.quality.offsamples = 0
    # As shipped the near plane is 15 cm away and cuts the fingers out of the wrist camera's picture.
    spec.visual.map.znear = 0.01
    spec.visual.global_.offwidth = spec.visual.global_.offheight = max(IMAGE_SIZE, 640)
    return spec.compile()


def _light(model: Any) -> Light:
    """The model's own lights, which a scene's ``Look`` scales."""
    headlight = model.vis.headlight
    return model.light_diffuse.copy(), headlight.ambient.copy(), headlight.diffuse.copy()


def _close_all(renderers: dict[tuple[int, int, int], Any]) -> None:
    """Free the OpenGL contexts."""
    while renderers:
        renderers.popitem()[1].close()


class SimRobot:
    """A scene and two arms that obey position set-points.

    Args:
        scene: what lies on the table and how the arms start; ``reset`` puts another.
        seed: of the noise that ``motor_noise`` adds; everything else is deterministic.
        motor_noise: standard deviation (rad) of a slowly changing error of the right arm's set-points.
    """

    def __init__(self, scene: Scene, seed: int = 0, motor_noise: float = 0.0) -> None:
        self._mujoco = load_mujoco()
        self._built: dict[int, tuple[Any, Any, Light]] = {}  # by the number of cubes
        self._renderers: dict[tuple[int, int, int], Any] = {}
        self._random = np.random.default_rng(seed)
        self.motor_noise = motor_noise
        self.model: Any = None
        self.data: Any = None
        self.scene = scene
        self.reset(scene)

    def reset(self, scene: Scene) -> None:
        """Put ``scene`` on the table, the arms at its start, and the time to 0."""
        count = len(scene.cubes)
        if self.model is None or count != len(self.scene.cubes):
            if count not in self._built:
                model = _build(count)
                self._built[count] = (model, self._mujoco.MjData(model), _light(model))
            self.model, self.data, self._light = self._built[count]
            self._find()
        self.scene = scene
        self._mujoco.mj_resetData(self.model, self.data)
        for index, cube in enumerate(scene.cubes):
            geom = self.model.geom(f"cube{index}").id
            self.model.geom_size[geom] = cube.half
            self.model.geom_rbound[geom] = cube.half * np.sqrt(3.0)
            self.model.geom_aabb[geom, 3:] = cube.half
            self.model.geom_rgba[geom] = (*cube.shade, 1.0)
            address = self._cube_qpos[index]
            half_turn = cube.yaw / 2
            self.data.qpos[address : address + 7] = (
                *(cube.x, cube.y, cube.half),
                *(np.cos(half_turn), 0.0, 0.0, np.sin(half_turn)),
            )
        self._apply_look(scene.look)
        self._drift = np.zeros(6)
        self.place(np.asarray(scene.start, np.float64))

    def _find(self) -> None:
        """Addresses of joints, actuators and cubes in MuJoCo's arrays."""
        model = self.model
        arms = [f"vx300s_{name.replace('_', '/', 1)}" for name in JOINT_NAMES]
        fingers = [name.replace("gripper", "left_finger") for name in arms]
        opposite = [name.replace("gripper", "right_finger") for name in arms if name.endswith("gripper")]
        joints = [model.joint(name) for name in fingers]
        self._qpos = np.array([int(j.qposadr[0]) for j in joints])
        self._qvel = np.array([int(j.dofadr[0]) for j in joints])
        self._opposite_qpos = np.array([int(model.joint(n).qposadr[0]) for n in opposite])
        self._opposite_qvel = np.array([int(model.joint(n).dofadr[0]) for n in opposite])
        by_joint = {int(model.actuator_trnid[a, 0]): a for a in range(model.nu)}
        self._actuators = np.array([by_joint[j.id] for j in joints])
        self._opposite_actuators = np.array([by_joint[model.joint(n).id] for n in opposite])
        self._grippers = np.array([i for i, n in enumerate(JOINT_NAMES) if n.endswith("gripper")])
        self.limits = np.array([j.range for j in joints])
        self._cube_qpos = [int(joint.qposadr[0]) for joint in self._cube_joints()]
        self._tip_body = model.body("vx300s_right/gripper_link").id
        self._table = model.geom("table").id

    def _cube_joints(self) -> list[Any]:
        return [self.model.joint(f"cube{i}") for i in range(self.model.njnt) if self._has_cube(i)]

    def _has_cube(self, index: int) -> bool:
        return self._mujoco.mj_name2id(self.model, self._mujoco.mjtObj.mjOBJ_JOINT, f"cube{index}") >= 0

    def _apply_look(self, look: Look) -> None:
        diffuse, ambient, head = self._light
        self.model.light_diffuse[:] = np.clip(diffuse * look.diffuse, 0, 1)
        self.model.vis.headlight.ambient[:] = np.clip(ambient * look.ambient, 0, 1)
        self.model.vis.headlight.diffuse[:] = np.clip(head * look.diffuse, 0, 1)
        self.model.geom_rgba[self._table, :3] = look.table

    def place(self, joints: NDArray[np.float64]) -> None:
        """Put the arms at ``joints`` (float64 [14]) at rest, with the set-points there too."""
        self.data.qpos[self._qpos] = joints
        self.data.qpos[self._opposite_qpos] = -joints[self._grippers]
        self.data.qvel[:] = 0.0
        self.command(joints)
        self._mujoco.mj_forward(self.model, self.data)

    @property
    def time_ns(self) -> int:
        """Simulated time in nanoseconds since ``reset``."""
        return round(self.data.time / TIME_STEP) * round(TIME_STEP * 1e9)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """The 14 names, in the order of every joint array here."""
        return JOINT_NAMES

    @property
    def positions(self) -> NDArray[np.float64]:
        """float64 [14]: rad; grippers m, the mean travel of the two fingers."""
        positions = self.data.qpos[self._qpos].copy()
        positions[self._grippers] = (positions[self._grippers] - self.data.qpos[self._opposite_qpos]) / 2
        return positions

    @property
    def velocities(self) -> NDArray[np.float64]:
        """float64 [14]: rad/s; grippers m/s."""
        velocities = self.data.qvel[self._qvel].copy()
        velocities[self._grippers] = (velocities[self._grippers] - self.data.qvel[self._opposite_qvel]) / 2
        return velocities

    @property
    def set_points(self) -> NDArray[np.float64]:
        """float64 [14]: what was commanded last."""
        return self._set_points.copy()

    @property
    def tip(self) -> NDArray[np.float64]:
        """float64 [3]: the right gripper's tip in the world (m)."""
        axis = self.data.xmat[self._tip_body].reshape(3, 3)[:, 0]
        return self.data.xpos[self._tip_body] + TIP_OFFSET * axis

    def cube_position(self, index: int) -> NDArray[np.float64]:
        """float64 [3]: centre of the scene's cube ``index`` in the world (m)."""
        address = self._cube_qpos[index]
        return self.data.qpos[address : address + 3].copy()

    def cube_yaw(self, index: int) -> float:
        """Rotation of the scene's cube ``index`` about the vertical (rad)."""
        w, x, y, z = self.data.qpos[self._cube_qpos[index] + 3 : self._cube_qpos[index] + 7]
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    def command(self, set_points: NDArray[np.float64]) -> None:
        """Set the position set-points, float64 [14], clipped to the actuators' ranges.

        Raises:
            InputError: not 14 finite numbers.
        """
        values = np.asarray(set_points, np.float64)
        if values.shape != (len(JOINT_NAMES),) or not np.isfinite(values).all():
            raise InputError.at("simulated robot", "set-points", values.tolist(), "14 finite numbers")
        self._set_points = np.clip(values, self.limits[:, 0], self.limits[:, 1])
        control = self._set_points.copy()
        control[7:13] += self._drift
        self.data.ctrl[self._actuators] = control
        self.data.ctrl[self._opposite_actuators] = -control[self._grippers]

    def step(self, steps: int = 1) -> None:
        """Advance physics by ``steps`` of 2 ms with the set-points held."""
        if self.motor_noise:
            # An Ornstein-Uhlenbeck error with a time constant of 0.25 s, so that it moves the arm.
            decay = np.exp(-steps * TIME_STEP / 0.25)
            kick = self._random.standard_normal(6) * self.motor_noise
            self._drift = decay * self._drift + np.sqrt(1 - decay**2) * kick
            self.command(self._set_points)
        self._mujoco.mj_step(self.model, self.data, nstep=steps)

    def render(self, camera: str, size: int = IMAGE_SIZE) -> NDArray[np.uint8]:
        """uint8 [size, size, 3], RGB, of ``base_0_rgb``, ``right_wrist_0_rgb`` or a camera of gym-aloha.

        Call it from one thread only: an OpenGL context belongs to its thread.
        """
        return self.render_frame(camera, size, size)

    def render_frame(self, camera: str, height: int, width: int) -> NDArray[np.uint8]:
        """uint8 [height, width, 3], RGB, at most 640 a side.

        Raises:
            InputError: there is no such camera.
        """
        names = [self.model.camera(i).name for i in range(self.model.ncam)]
        if camera not in names:
            raise InputError.at("simulated robot", "camera", camera, f"one of {', '.join(names)}")
        key = (len(self.scene.cubes), height, width)
        renderer = self._renderers.get(key)
        if renderer is None:
            renderer = self._mujoco.Renderer(self.model, height, width)
            renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            if not self._renderers:
                # MuJoCo's own hook, which ends the display, is there by now: the last one runs first.
                atexit.register(_close_all, self._renderers)
            self._renderers[key] = renderer
        renderer.update_scene(self.data, camera=camera)
        return renderer.render().copy()

    def close(self) -> None:
        """Free the OpenGL contexts."""
        _close_all(self._renderers)
