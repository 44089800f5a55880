"""What labkit costs, measured against what one would write by hand. Run by `make bench`."""
