"""A simulated robot in MuJoCo, its tasks and its scripted expert. No ROS."""
