"""The command line. Modules import what they need when a command runs, so that `labkit --help` is quick."""
