"""A ROS 2 node that runs a pi0.5-class policy on the robot's own GPU at a fixed frequency."""

__version__ = "0.1.0"
