"""The agent as a unit of systemd, from installation to purge: `python -m tests.package`."""
