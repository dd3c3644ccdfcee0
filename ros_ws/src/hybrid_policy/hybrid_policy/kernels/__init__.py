"""Number formats and GPU kernels."""
