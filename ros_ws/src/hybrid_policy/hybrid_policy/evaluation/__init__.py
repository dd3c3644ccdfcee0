"""Bags in, reports out. No rclpy."""
