"""`python -m lib.sweeps [DEVICE]` (installed: `python -m sdn.sweeps`) prints which backends of the
sweeps agree with the reference on a device, and what has been chosen."""

import sys

from .selection import report

print(report(*sys.argv[1:2]))
