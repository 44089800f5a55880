# %% loyalty
from labkit.patterns import RetryingConsumer, dead_letter

loyalty = RetryingConsumer(
    checkouts, reward, guarantee="exactly once", retry=dead_letter(non_retriable=(NoCard,))
)

exercise(
    "A consumer of checkouts that sends points exactly once; NoCard goes to the dead letters.",
    check=lambda loyalty: loyalty.guarantee == "exactly once" and loyalty.handler is reward
    and loyalty.topics == checkouts and NoCard in loyalty.retry.non_retriable,
    loyalty=loyalty,
)
