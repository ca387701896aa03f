"""The kernel tests on other kernels, each in a QEMU machine of its own: `python -m tests.vm`."""
