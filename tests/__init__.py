"""Whatever starts an agent from here, tests and benches, does not serve the devices of the machine
that it runs on: `auto`, the default, would."""

import os

os.environ["POINTSMAN_DEVICES"] = "none"
