"""Parts shared by the models.

Importing anomalib's models registers ours, which need these parts. So it happens before the first of them is read, not
in the middle of it.
"""

import anomalib.models  # noqa: F401
