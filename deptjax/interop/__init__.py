"""Formats of other libraries, in and out; whatever is heavy is imported inside functions."""
