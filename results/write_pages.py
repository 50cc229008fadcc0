"""Writes the pages of results from the stored runs.

    python results/write_pages.py

From results/runs.jsonl and results/curves.npz it writes the tables of results/README.md and
results/claims.md, the table of methods in README.md, and the pictures in .github/pictures. A table
stands between two comments that name it. What is written outside of these stays.
results/make.py makes the runs, and calls this at its end.
"""

import claims
import pictures
import plan
import store
import tables

TABLES = {
    "README.md": {"methods": tables.methods},
    "results/README.md": {
        "shapes": tables.shapes,
        "ablations": tables.ablations,
        "photographs": tables.photographs,
        "all_images": tables.all_images,
    },
    "results/claims.md": {"claims": claims.table},
}


def replaced(text, name, lines):
    """The text with `lines` between the two comments that name a table."""
    begin = f"<!-- {name}: written by results/write_pages.py -->"
    end = f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the page must have {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    table = "\n".join(lines)
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def not_made(planned, runs, table):
    """A sentence for a table of which runs are missing, as a list of lines."""
    count = len(store.select(planned, table)) - len(store.select(runs, table))
    if count == 0:
        return []
    return ["", f"{count} runs of this table are not made yet."]


def write_pages():
    planned = plan.planned()
    keys = {store.key(run) for run in planned}
    runs = [run for run in store.load() if store.key(run) in keys]
    texts = {}
    for page, its_tables in TABLES.items():
        text = (store.ROOT / page).read_text(encoding="utf-8")
        for name, table in its_tables.items():
            lines = [*table(runs), *not_made(planned, runs, name)]
            text = replaced(text, name, lines)
        texts[page] = text
    for page, text in texts.items():
        (store.ROOT / page).write_text(text, encoding="utf-8", newline="\n")
    pictures.matrix(runs)
    pictures.spectra(runs)
    pictures.curves(runs)


if __name__ == "__main__":
    write_pages()
