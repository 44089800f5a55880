"""What a notebook holds: a Lab, its pods, faults, board and verdict in a room each, and what a learner fills in."""
