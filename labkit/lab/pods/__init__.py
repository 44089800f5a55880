"""Pods: processes that run what was deployed. A deployment keeps the wanted number of them running.

`pod` is what a notebook holds of one, `process` runs inside it, `travel` takes handlers there, `telemetry` reports.
"""
