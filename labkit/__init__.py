"""Learn event-driven architecture by breaking it.

`labkit.lab` is what a notebook holds, `labkit.patterns` what a service can lift, `labkit.kafka` what both stand on.
"""

__version__ = "0.1.0"
