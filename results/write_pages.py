"""Writes the pages of results from the stored runs, and stores new runs.

    python results/write_pages.py
    python results/write_pages.py add RUN [RUN ...] --table NAME

Without arguments it writes again, from results/runs.jsonl and results/curves.npz: the tables of
results/README.md and results/claims.md, the table of methods in README.md, and the pictures
mechanisms.png and curves.png in .github/pictures. A table stands between two comments that name it.
What is written outside of these stays.

`add` evaluates finished runs, which are run folders of the training scripts, and stores them. It
takes about a minute for a run. results/store.py says what is stored.
"""

import argparse

import claims
import pictures
import store
import tables

TABLES = {
    "README.md": {"methods": tables.methods},
    "results/README.md": {
        "shapes": tables.shapes,
        "ablations": tables.ablations,
        "budget": tables.budget,
        "all images": tables.all_images,
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


def write_pages():
    runs = store.load()
    for page, its_tables in TABLES.items():
        path = store.ROOT / page
        text = path.read_text(encoding="utf-8")
        for name, table in its_tables.items():
            text = replaced(text, name, table(runs))
        path.write_text(text, encoding="utf-8")
    pictures.mechanisms(runs)
    pictures.curves(runs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    add = commands.add_parser("add", help="evaluate finished runs and store them")
    add.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    add.add_argument("--table", required=True, choices=store.TABLES, help="the table to show it in")
    options = parser.parse_args()
    if options.command == "add":
        store.add(options.runs, options.table)
    else:
        write_pages()


if __name__ == "__main__":
    main()
