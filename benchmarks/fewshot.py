"""Few- and any-shot classification: accuracy on classes, and on data sets, that training has not seen.

    python benchmarks/fewshot.py                                       # everything, one after the other
    python benchmarks/fewshot.py --tables omniglot --ways-shots 20w1s --methods tpn --seeds 0 --results tpn-20w1s-0.csv

    omniglot   28 x 28, Vinyals classes in four rotations: 5- and 20-way, 1 and 5 shots
    cifar-fs   32 x 32, 100 images a class (published figures have 600): 5-way, queries balanced and Dirichlet
    any-shot   5-way, 1 to 50 shots, trained on CIFAR-FS; tested on its test classes and on data sets never seen
    mxml       5-way 5-shot, members Omniglot, CIFAR-FS, GTSRB and Flowers; tested on their held-out classes and on other data sets
    frozen     EfficientNet-Lite0's features and heads, 5-way 1 and 5 shots

Tables are made by fewshot_episodic.py (omniglot, cifar-fs), fewshot_anyshot.py, fewshot_mxml.py and fewshot_frozen.py; what they share is
in fewshot_trainings.py.

Every table, method, setting and seed can be a process of its own, with a --results file of its own: a row per test set and query balance.
A method is one of `smidgen fewshot train`, with options after + ("btaml+omega=false") and, after @, shots to train with ("tpn@5";
"@higher": 5 for 1, 10 for 5). Rows come besides, without more training, of
    protonet   "label-propagation", over its backbone, with sigma chosen on validation tasks (unlearned)
    tpn, label propagation, where queries are Dirichlet: "... rebalanced", strength chosen on Dirichlet tasks of the validation classes
    btaml      "btaml mean", by the mean of phi in place of ten samples

Recipes (what is ours is marked *)
    omniglot, cifar-fs   Adam 1e-3; TPN's is halved every 10,000 of 210,000 tasks and tested after 5 to 8 halvings. Here* --steps updates of
                         --tasks tasks, halved three times over them, for every method alike; CIFAR-FS images, being few, are cropped and
                         mirrored*; the state of the best of 20 validations is kept. TPN's sigma starts at 0.3*, "tpn+start=0.0" as drawn
    any-shot             Adam 1e-3, 4 tasks, 5 inner steps in training and 10 at test; of the authors' 50,000 updates
                         --anyshot-steps*, the rate falling to 0 as a cosine*; inner loops start from a ProtoNet's convolutions,
                         --start-steps updates of one 20-way 5-shot task*, all alike. Chosen on CIFAR-FS's validation classes alone
                         (the authors: on those of the unseen sets as well). With --keep a process may train (`--tested` with nothing
                         behind it) and others test, a set each
    mxml                 members Adam 1e-3, a tenth after 70 %, 100 x images / 150 updates, at least 1,000*; one learner: their sum*;
                         weights Adam 1e-4, a tenth after 70 %, --weight-steps updates, 3 queries a class, on classes that no member saw
                         (Flowers has none to spare, as VOC had not); classes in order: GTSRB 60 / 20 / 20 %*, Flowers 7 / 0 / 5*
    frozen               nothing is trained but the TPN head's graph module, on CIFAR-FS training classes*; features are centred by those
                         classes' mean, the heads of `smidgen fewshot predict` by the mean of a task's own support

Accuracy is the mean over episodes, the interval 1.96 s / sqrt(episodes) of it. Images of other shapes are scaled, and grey ones made
coloured, where a table mixes data sets. Of GTSRB frames of one track are never in both support and queries: half of a class's tracks,
drawn anew for every task, are for each; the published any-shot protocol ignores tracks.

One thread of two busy cores, seconds of processor time per update of 4 tasks, 32 x 32, 15 queries: ProtoNet 5w1s 0.65, TPN 5w1s 0.75, TPN
5w5s 1.05. Trainings are a GPU's work.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import rows
import torch
from fewshot_anyshot import ANYWHERE, any_shot
from fewshot_episodic import cifar_fs, omniglot
from fewshot_frozen import frozen
from fewshot_mxml import mxml

from smidgen.fewshot.augment import KINDS

RESULTS = Path(__file__).parent / "results" / "fewshot.csv"
COLUMNS = [
    "table", "method", "trained", "tested", "ways", "shots", "queries", "seed", "accuracy", "interval", "episodes", "batch_norm",
    "chosen", "steps", "kept", "tasks", "augment", "start", "seconds", "commit", "machine", "date",
]  # fmt: skip
TABLES = {"omniglot": omniglot, "cifar-fs": cifar_fs, "any-shot": any_shot, "mxml": mxml, "frozen": frozen}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that rows are added to")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--methods", nargs="+", help='by default a list for each table; of mxml the mixtures, and "one learner"')
    parser.add_argument("--ways-shots", nargs="+", metavar="5w1s", help="of omniglot, cifar-fs and frozen; by default those named above")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    numbers = {
        "steps": (20_000, "updates of a training of omniglot and cifar-fs"),
        "tasks": (4, "tasks of each of these updates"),
        "halvings": (3, "of the learning rate in such a training"),
        "anyshot-steps": (20_000, "updates of an any-shot training, of 4 tasks"),
        "start-steps": (3000, "updates of the ProtoNet that inner loops of any-shot start from; 0: from random weights"),
        "member-steps": (20_000, "largest number of updates of a member of mxml"),
        "weight-steps": (10_000, "updates of a weight network of mxml"),
        "head-steps": (2000, "updates of the TPN head over frozen features"),
        "episodes": (600, "of a test"),
        "validation": (200, "episodes of a validation"),
        "queries": (15, "per class"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default}")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--augment", nargs="*", choices=KINDS, help="of training images; by default flip crop for cifar-fs alone")
    parser.add_argument("--graphs", action="store_true", help="train omniglot, cifar-fs, any-shot and the TPN head by CUDA graphs")
    parser.add_argument("--tested", nargs="*", choices=ANYWHERE, help="sets that any-shot tests on; by default all")
    parser.add_argument(
        "--keep", type=Path, help="folder that keeps trained any-shot methods and their starts; those that are there are not trained"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps features of frozen backbones")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options = parser.parse_args(given)
    for name in numbers:
        if vars(options)[name.replace("-", "_")] < (name != "start-steps"):
            parser.error(f"--{name} must be positive")
    return options


def main(options: argparse.Namespace) -> None:
    """Fills the tables."""
    made_by = rows.provenance()
    for seed in options.seeds:
        for table in options.tables:
            for row in TABLES[table](seed, options):
                row |= {"table": table, "seed": seed} | made_by
                rows.append(options.results, COLUMNS, [row])
                print("\t".join(str(row[c]) for c in COLUMNS[:10]), flush=True)


if __name__ == "__main__":
    main(arguments())
