"""What a kube-proxy on this node has programmed into the kernel, read to be compared."""
