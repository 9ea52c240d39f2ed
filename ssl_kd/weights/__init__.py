"""Weights in and out of files: what others trained, and what was trained here for others."""
