"""Whatever starts an agent from here, tests and benches, does not serve the devices of the machine
that it runs on: `auto`, the default, would. What one of them had compiled is there for all others
of a run, in every process of it, and gone with the first."""

import atexit
import os
import shutil
import tempfile

os.environ["POINTSMAN_DEVICES"] = "none"

if "POINTSMAN_COMPILED" not in os.environ:
    os.environ["POINTSMAN_COMPILED"] = tempfile.mkdtemp(prefix="pointsman-compiled-")
    atexit.register(shutil.rmtree, os.environ["POINTSMAN_COMPILED"], ignore_errors=True)
