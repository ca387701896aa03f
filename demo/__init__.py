"""`make demo`: the case Pointsman exists for, played in network namespaces of this machine.

No agent of it serves the devices of that machine: `auto`, the default, would.
"""

import os

os.environ["POINTSMAN_DEVICES"] = "none"
