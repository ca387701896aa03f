"""Pointsman: a Service load balancer for Linux nodes, at the socket and by XDP and TC."""

__version__ = "0.1.0"
