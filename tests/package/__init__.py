"""The Debian package's life on a node with systemd: `python -m tests.package`."""
