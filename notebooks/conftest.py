"""Which notebooks `make test` executes.

The two longest are left to `make notebooks`, which executes all: comparing and exporting have tests of their own.
"""

import os

collect_ignore = [] if os.environ.get("ALL_NOTEBOOKS") else ["side_by_side.ipynb", "export_to_openvino.ipynb"]
