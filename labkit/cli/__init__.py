"""The command line. Each module imports what it needs when a command runs, so that `labkit --help` is at once there."""
