# %% loyalty
by_events = orders.event_processor(points, invoiced, credited, failed, undone)
third = process(3, "charge", "fraud-check", "reserve", "ship", "invoice", "loyalty")

exercise(
    "A processor that credits points, and a process of which they are the last step.",
    check=lambda by_events, third: credits(by_events) and follows(third),
    by_events=by_events, third=third,
)
