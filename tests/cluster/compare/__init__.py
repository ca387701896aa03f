"""Pointsman and kube-proxy on the same objects: who gives a client which endpoints, and why not."""
