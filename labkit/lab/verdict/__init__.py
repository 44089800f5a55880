"""The verdict: whether a lab has come to rest, what was sent, what took effect, and how that is judged.

`anomalies` has the rules; `trace` tells of one record.
"""
