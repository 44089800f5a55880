# %% largest
def raise_to(value, command):
    amount = command.value["amount"]
    if amount < 0:
        raise ValueError(f"an amount of {amount}")
    return max(value or 0, amount)

largest = AtomicKeyValueStore(purchases, maxima, raise_to)

exercise(
    "A store of the largest purchase by customer; a negative amount does not count.",
    check=lambda largest: (largest.commands, largest.store) == (purchases, maxima)
    and try_out(largest, -5, 7, 12, -1, 3) == 12 and try_out(largest, -5) is None,
    largest=largest,
)
