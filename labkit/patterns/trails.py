"""For `labkit.lab.runs`, until it imports from `own_topics`."""

from labkit.patterns.own_topics import taken_apart as taken_apart
