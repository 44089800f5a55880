"""The board: a live picture of a lab with buttons. The sampler reads the figures; `panels` are what is drawn of them.

`picture` lays panels out, `canvas` makes a PNG of that.
"""
