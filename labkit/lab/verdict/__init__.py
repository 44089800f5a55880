"""The verdict: whether a lab has come to rest, what was sent and what took effect, and what is judged of that.

`anomalies` has the rules; `trace` tells of one record.
"""
