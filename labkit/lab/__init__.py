"""What a notebook holds: labs and their pods, loads, boards, verdicts, and the learner's widgets."""
