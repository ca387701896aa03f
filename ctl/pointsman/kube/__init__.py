"""The Kubernetes source: Services and what goes with them, listed and watched at an API server."""
