"""Nodes; the only place that imports rclpy."""
