# %% policy
policy = blocking(0.5, non_retriable=(payments.CardDeclined,)).then(retry_topics(10, 60)).then(dead_letter())

exercise(
    "One blocking retry, then two retry topics; a declined card is not retried.",
    check=lambda policy: policy.blocks.delay(1) == 0.5 and policy.blocks.delay(2) is None
    and policy.topics == (10, 60) and payments.CardDeclined in policy.non_retriable,
    policy=policy,
)
