"""Pointsman: a socket-level Service load balancer for Linux nodes."""

__version__ = "0.1.0"
