#!/usr/bin/python3
"""`wheels.py DIRECTORY`: downloads what pip installs in a Debian 12 VM that reaches no index."""

import subprocess
import sys
import tomllib
from pathlib import Path

found = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
project = found["project"]
wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
wanted += found["build-system"]["requires"] + ["editables"]  # to build the project itself
command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", sys.argv[1]]
command += ["--only-binary=:all:", "--python-version=3.11"]
command += [f"--platform={each}_x86_64" for each in ("manylinux2014", "manylinux_2_28")]
sys.exit(subprocess.run(command + wanted, check=False).returncode)
