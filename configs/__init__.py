"""Configs: one file a job, `get_config(arg=None)`."""
