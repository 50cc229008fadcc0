"""Which runs the pages of results are made of."""

import store
import tables

SHAPES = "--dataset shapes"
PHOTOGRAPHS = (
    "--dataset folder --data-dir data/cifar --image-size 16 --width 16 --epochs 50 --eval-every 5"
)
ALL_IMAGES = "--dataset folder --data-dir data/cifar50 --width 16 --eval-every 4"

# What else the ledger of claims needs: a method, and its flags.
CLAIMS = (
    ("swav", f"{SHAPES} --freeze-prototypes"),
    ("byol", f"{SHAPES} --momentum 0"),
    ("byol", f"{SHAPES} --momentum 0.9"),
    ("byol", f"{SHAPES} --momentum 0.99"),
    ("center_vector", "--dataset blobs"),
    ("center_vector", "--dataset moons"),
    ("simsiam", "--dataset blobs"),
    ("simsiam", "--dataset moons"),
    ("simsiam", "--dataset moons --no-predictor"),
    ("simsiam", "--dataset moons --no-stop-gradient"),
)

# Table 1 of the CPLearn paper, CPLearn last. claims.md compares these methods on the photographs,
# so they have a second seed there.
TABLE_1 = ("barlow_twins", "swav", "gedi", "self_classifier", "cplearn")

# As many epochs as take about an hour on one thread in bf16.
EPOCHS = {"simclr": 25, "barlow_twins": 16, "vicreg": 14, "cplearn": 17}

# About how many minutes of one thread a run takes, measuring included.
MINUTES = {"shapes": 3, "ablations": 3, "photographs": 25, "all_images": 120, "claims": 2}


def planned():
    """All runs, in the order in which they are made: seed 0 of all tables but the slowest first."""
    runs = []
    for seed in (0, 1, 2):
        for method, _, _, mechanisms in tables.METHODS:
            runs.append(planned_run("shapes", method, SHAPES, seed))
            if seed == 0:
                for flags in mechanisms:
                    runs.append(planned_run("ablations", method, f"{SHAPES} {flags}", seed))
        if seed == 0:
            for method, flags in CLAIMS:
                runs.append(planned_run("claims", method, flags, seed))
            for method, _, _, _ in tables.METHODS:
                runs.append(planned_run("photographs", method, PHOTOGRAPHS, seed))
        if seed == 1:
            for method in TABLE_1:
                runs.append(planned_run("photographs", method, PHOTOGRAPHS, seed))
    for method, epochs in EPOCHS.items():
        runs.append(planned_run("all_images", method, f"{ALL_IMAGES} --epochs {epochs}", 0))

    codes = {method: store.code_of(method) for method, _, _, _ in tables.METHODS}
    for run in runs:
        run["code"] = codes[run["method"]]
    return runs


def planned_run(table, method, flags, seed):
    command = f"python methods/{method}.py {flags} --seed {seed}"
    return {"table": table, "method": method, "command": command, "seed": seed}
