"""Say for which Python on which system wheels are: a bundle fits where this says the same."""

import platform
import sys

print(f"{sys.version_info.major}.{sys.version_info.minor}", platform.system(), platform.machine())
