"""Suites: tasks, methods and seeds in one command, with a table and a report (see `run.py`)."""
