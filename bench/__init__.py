"""Accuracy and speed measurements."""
