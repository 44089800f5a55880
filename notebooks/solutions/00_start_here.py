# %% exercise
most = 4  # a partition has one reader at a time in its group: a fifth pod stands by

exercise(
    "How many pods can work on 4 partitions at once?",
    check=lambda most: most == 4 or "Add pods on the board: which get a partition?",
    most=most,
)
