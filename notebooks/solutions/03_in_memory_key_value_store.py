# %% juba
day = datetime(2021, 1, 31, tzinfo=UTC)  # at 21:00 UTC, when it was midnight in Juba: from +03:00 to +02:00

def goes_back(day):
    today, tomorrow = (zone_at("Africa/Juba", "SS", one).offset for one in (day, day + timedelta(days=1)))
    return today > tomorrow or "Put the clock to the beginning and to the end of that day: atlas says the same."

exercise("On which day did South Sudan put its clocks back?", check=goes_back, day=day)
