"""Faults: what can be broken and mended besides pods, what a cell planned to break, and the socket for the terminal.

A `target` has the verbs; a service, the connection to a broker, servers and Kafka Connect are such targets. A `trap`
catches a pod at a step of its consumer.
"""
