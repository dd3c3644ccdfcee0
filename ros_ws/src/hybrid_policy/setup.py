from glob import glob

from setuptools import find_packages, setup

package_name = "hybrid_policy"

setup(
    name=package_name,
    version="0.1.0",
    packages=find_packages(include=[package_name, f"{package_name}.*"]),
    package_data={package_name: ["kernels/*.cu"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{package_name}"]),
        (f"share/{package_name}", ["package.xml"]),
        (f"share/{package_name}/launch", glob("launch/*.launch.py")),
        (f"share/{package_name}/config", glob("config/*.yaml") + glob("config/*.xml")),
        (f"share/{package_name}/config/robots", glob("config/robots/*.yaml")),
        (f"share/{package_name}/config/recipes", glob("config/recipes/*.yaml")),
        (f"share/{package_name}/checkpoints/sim_pi05", glob("checkpoints/sim_pi05/*")),
    ],
    install_requires=[
        "setuptools",
        "numpy",
        "opencv-python-headless",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "torch>=2.6",
        "triton>=3.6; platform_system == 'Linux'",
        "rich",
    ],
    extras_require={
        "ros": [
            "ros-rclpy",
            "ros-rmw-fastrtps-cpp",
            "ros-sensor-msgs",
            "ros-trajectory-msgs",
            "ros-diagnostic-msgs",
            "ros-geometry-msgs",
            "ros-lifecycle-msgs",
            "ros-std-srvs",
        ],
        "sim": ["mujoco", "pillow"],  # and gym-aloha without its dependencies: see the Makefile
        "eval": ["rosbags", "matplotlib", "pyarrow", "av"],
        "ray": ["ray"],
        "test": ["pytest", "pytest-timeout", "hypothesis"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML"],
    },
    zip_safe=True,
    maintainer="hybrid_policy maintainers",
    maintainer_email="maintainers@hybrid-policy.dev",
    description="A pi0.5-class policy at a fixed frequency on the robot's own GPU, in hybrid precision",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            "hybrid-policy = hybrid_policy.cli:main",
            "policy_node = hybrid_policy.ros.policy_node:main",
            "sim_robot_node = hybrid_policy.ros.sim_robot_node:main",
        ]
    },
)
