# %% juba
day = datetime(2021, 1, 31, tzinfo=UTC)  # at 21:00 UTC, when it was midnight in Juba: from +03:00 to +02:00

exercise(
    "On which day did South Sudan put its clocks back?",
    check=lambda day: True if zone_at("Africa/Juba", "SS", day).offset > zone_at("Africa/Juba", "SS", day + timedelta(days=1)).offset
    else "Put the clock to the beginning and to the end of that day: atlas says the same.",
    day=day,
)
