# %% juba
# At 21:00 UTC, when it was midnight in Juba: from +03:00 to +02:00.
day = datetime(2021, 1, 31, tzinfo=UTC)

def goes_back(day):
    both = (day, day + timedelta(days=1))
    today, tomorrow = (time_zones.zone_at("Africa/Juba", "SS", one).offset for one in both)
    return today > tomorrow or "Put the clock to its beginning and to its end: atlas says the same."

exercise("On which day did South Sudan put its clocks back?", check=goes_back, day=day)
