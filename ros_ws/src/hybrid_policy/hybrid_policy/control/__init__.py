"""What a controller knows about time, chunks and limits. No torch, no ROS."""
