# %% crowded-sites
def crowded(record):
    apps = record.value.apps
    return [(len(apps),)] if len(apps) >= 10 else []

def judge(crowded):
    @dataclass
    class Of:
        value: Context
    few, many = ([sites.App(f"app-{n}", "1.0") for n in range(size)] for size in (9, 10))
    if list(crowded(Of(Context(1, "ada", many)))) != [(10,)]:
        return "A site with ten apps should give one row, (10,): a list with one tuple in it."
    nine = list(crowded(Of(Context(1, "ada", few))))
    return nine == [] or "A site with nine apps should give no row: []."

exercise("Rows of a view that knows the sites with ten apps or more.", check=judge, crowded=crowded)
