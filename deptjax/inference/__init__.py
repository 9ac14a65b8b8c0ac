"""Decoding, and prediction for many tuned tasks from one frozen model."""
