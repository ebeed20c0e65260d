"""Symbolic tasks: accuracy where questions are like those of training (id) and where they are longer (ood), all models, several seeds.

    python benchmarks/symbolic.py                                         # everything; a GPU's work
    python benchmarks/symbolic.py --tasks word-problem --models s2g-cnn s2g-cnn+carry=true@sharpen=0.02 --seeds 0 1 2 3 4
    python benchmarks/symbolic.py --tasks addition --models s2g-cnn+guided=true     # the toy whose alignment is given
    python benchmarks/symbolic.py --workers 3 --gpus 4                    # twelve trainings at a time; what --results has is not run again
    python benchmarks/symbolic_tables.py                                  # mean, deviation and best over seeds, and what bAbI is solved

A model is one of `smidgen symbolic train`, with options after + and settings of the training after @ (curriculum, sharpen, steps, batch,
learning_rate, questions, ...). Batches of 256, a warm-up, and bfloat16 in the grid network, are a GPU's version of the authors' 64,000
updates of about 32 questions; `steps` x `batch` says how many questions were seen.

A row per split and group of questions: accuracy over every symbol; of models with a grid, `hard`: with the most probable action of every
token instead of mixtures; of those with rules for the exact back end, shares of all questions: `exact` has right, `answered` surely enough,
`answered_right` both. 10,000 test questions a split, the same for all (bAbI: all of its 20,000). The state tested is
the one best on 1,000 dev questions. Training questions are the same for all seeds, which choose first parameters and order.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from rows import append, provenance, read, settings
from torch import nn

from smidgen.run import Run
from smidgen.symbolic.card import Card
from smidgen.symbolic.grid_model import GridModel
from smidgen.symbolic.models import make, sizes_of
from smidgen.symbolic.predict import predict, right
from smidgen.symbolic.replay import has_fixed_shapes
from smidgen.symbolic.seq2grid import hard_layouts
from smidgen.symbolic.settle import outcomes, settle
from smidgen.symbolic.tasks import Batch, Task, open_task
from smidgen.symbolic.train import Config, drawn, train, validation

RESULTS = Path(__file__).parent / "results" / "symbolic.csv"
COLUMNS = [
    "task", "model", "seed", "split", "group", "accuracy", "hard", "exact", "answered", "answered_right", "questions", "dev", "steps",
    "batch", "seen", "parameters", "seconds",
    "steps_per_second", "commit", "machine", "date",
]  # fmt: skip
SEQUENCE_MODELS = ["lstm", "gru-attention", "transformer", "universal-transformer"]
PLAIN, CARRY, SHARPEN, CURRICULUM = "s2g-cnn", "+carry=true", "@sharpen=0.02", "@curriculum=0.3"
ABLATION = [PLAIN, PLAIN + CARRY, PLAIN + SHARPEN, PLAIN + CARRY + SHARPEN, PLAIN + CURRICULUM]
TASKS = {
    "number-sequence": [*ABLATION, "s2g-acnn", "cnn", *SEQUENCE_MODELS],
    "word-problem": [*ABLATION, "s2g-acnn", "cnn", *SEQUENCE_MODELS],
    "program": [PLAIN, PLAIN + CARRY + SHARPEN, "s2g-acnn", "cnn", *SEQUENCE_MODELS],
    "babi:joint": ["s2g-textcnn", "textcnn", *SEQUENCE_MODELS],
}
RATES = {"s2g-cnn": 2e-3, "s2g-acnn": 2e-3, "cnn": 2e-3}  # larger batches than the authors' bear larger rates with batch norm
RATE = 1e-3  # the authors', for the others
STARTED = time.monotonic()
ALL = "all"  # the group of all questions
TEST = 1_000_003  # seed of test questions
SOLVED = 0.95  # a bAbI task is, from this accuracy on


def config_of(task: str, spec: str, seed: int, options: argparse.Namespace) -> Config:
    """`name+option=value@setting=value` as the configuration of its training."""
    model, *changed = spec.split("@")
    name, *chosen = model.split("+")
    config = Config(
        task=task,
        model=name,
        option=settings(chosen),
        data=options.data / "babi" / "babi_en.tar.xz" if task.startswith("babi") else None,
        questions=options.questions,
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate or RATES.get(name, RATE),
        warmup=min(500, options.steps // 10),
        validation_questions=1000,
        compile=options.compile and name.startswith("s2g"),
        graph=options.graph,
        seed=seed,
    )
    return replace(config, **settings(changed))


def questions(task: Task, split: str, count: int, seed: int, cache: Path) -> Batch:
    """Drawn once, and kept: a million take longer to make than to learn from."""
    path = cache / f"{task.name.replace(':', '-')}-{split}-{count}-{seed}.npz"
    if not path.exists():
        batch = drawn(task, split, count, seed)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        tokens = batch.tokens.astype(np.int16)
        given = {} if batch.actions is None else {"actions": batch.actions.astype(np.int8)}
        np.savez(partial, tokens=tokens, lengths=batch.lengths, target=batch.target.astype(np.int16), group=batch.group, **given)
        partial.rename(path)
    stored = np.load(path)
    mask = np.arange(stored["tokens"].shape[1]) < stored["lengths"][:, None]
    actions = stored["actions"].astype(np.int64) if "actions" in stored else None
    return Batch(stored["tokens"].astype(np.int64), mask, stored["target"].astype(np.int64), stored["group"], actions)


def trained_and_tested(task_name: str, spec: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one training."""
    config = config_of(task_name, spec, seed, options)
    task = open_task(task_name, config.data)
    assert config.model is not None
    torch.manual_seed(seed)
    model = make(config.model, sizes_of(task), config.option).to(options.device)
    config = replace(config, graph=config.graph and has_fixed_shapes(model))
    training = questions(task, "train", config.questions, 0, options.cache)
    with tempfile.TemporaryDirectory() as scratch, Run("symbolic train", config, Path(scratch) / "run") as run:
        started = time.monotonic()
        result = train(model, task, training, validation(task, config), config, run)
        seconds = time.monotonic() - started
    shared = {
        "task": task_name,
        "model": spec,
        "seed": seed,
        "dev": result.evaluation(result.kept)["accuracy"],
        "steps": config.steps,
        "batch": config.batch,
        "seen": config.steps * config.batch,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "steps_per_second": round(config.steps / seconds, 2),
    }
    card = settle(model, spec, task, seed)
    return [shared | row for split in ("id", "ood") if split in task.splits for row in tested(model, task, split, card, options)]


def tested(model: nn.Module, task: Task, split: str, card: Card, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy over all questions of a test and over each group."""
    batch = questions(task, split, task.splits[split] or options.test, TEST, options.cache)
    found = {"accuracy": right(predict(model, batch), batch)}
    if isinstance(model, GridModel):
        with hard_layouts(model.module):
            found["hard"] = right(predict(model, batch), batch)
    if card.exact is not None:
        texts, targets = ([words.decode(row) for row in ids] for words, ids in ((task.tokens, batch.tokens), (task.answers, batch.target)))
        made = outcomes(model, card.rules, texts, batch)
        found["exact"] = np.array([outcome.answer == target for outcome, target in zip(made, targets, strict=True)])
        found["answered"] = np.array([outcome.answer is not None and outcome.score >= card.exact.threshold for outcome in made])
        found["answered_right"] = found["answered"] & found["exact"]
    masks = {ALL: np.ones(len(batch), bool)} | {name: batch.group == i for i, name in enumerate(task.groups) if len(task.groups) > 1}
    return [
        {"split": split, "group": name, "questions": int(mask.sum())} | {k: round(float(v[mask].mean()), 4) for k, v in found.items()}
        for name, mask in masks.items()
        if mask.any()
    ]


def spread(jobs: list[tuple[str, str, int]], options: argparse.Namespace) -> None:
    """Each job in a process of its own, `workers` at a time on each GPU."""
    for task in dict.fromkeys(task for task, _, _ in jobs):
        opened = open_task(task, config_of(task, "s2g-cnn", 0, options).data)
        questions(opened, "train", options.questions, 0, options.cache)
    places: Queue[int] = Queue()
    for place in range(options.workers * options.gpus):
        places.put(place % options.gpus)

    def one(job: tuple[str, str, int]) -> None:
        if late(options):
            return
        gpu = places.get()
        task, spec, seed = job
        command = [sys.executable, __file__, "--tasks", task, "--models", spec, "--seeds", str(seed), "--cache", str(options.cache)]
        passed = ("data", "steps", "batch", "questions", "test", "results")
        command += [part for name in passed for part in (f"--{name}", str(getattr(options, name)))]
        command += ["--learning-rate", str(options.learning_rate)] if options.learning_rate else []
        command += ["--compile"] * options.compile + ["--graph"] * options.graph
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (options.workers * options.gpus)))}
        done = subprocess.run(command, env=os.environ | threads | {"CUDA_VISIBLE_DEVICES": str(gpu)}, check=False)
        if done.returncode:
            print(f"failed, exit {done.returncode}: {task} {spec} seed {seed}", flush=True)
        places.put(gpu)

    with ThreadPoolExecutor(options.workers * options.gpus) as pool:
        list(pool.map(one, jobs))


def late(options: argparse.Namespace) -> bool:
    """Whether nothing new is to be begun."""
    return options.begin_within is not None and time.monotonic() - STARTED > options.begin_within


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--models", nargs="+", help="by default a list for each task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, help="by default 2e-3 for bottleneck networks, 1e-3 for the others")
    parser.add_argument("--questions", type=int, default=1_000_000, help="to train on")
    parser.add_argument("--test", type=int, default=10_000, help="questions of a test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "smidgen-symbolic", help="folder for drawn questions")
    parser.add_argument("--compile", action="store_true", help="fuse the grid networks of s2g models")
    parser.add_argument("--graph", action="store_true", help="launch the grid networks of s2g-cnn and s2g-acnn as one CUDA graph")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time on each GPU; 1 on 1 GPU: in this process")
    parser.add_argument(
        "--begin-within", type=float, metavar="SECONDS", help="begin no training later than that; repeat the command for the rest"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options = parser.parse_args()
    if min(options.steps, options.batch, options.questions, options.test, options.gpus, options.workers) < 1:
        parser.error("numbers must be positive")
    if options.graph and options.device.type != "cuda":
        parser.error("--graph needs a CUDA device; leave it out")
    return options


def main(options: argparse.Namespace) -> None:
    """What is left to do."""
    options.cache.mkdir(parents=True, exist_ok=True)
    have = {(row["task"], row["model"], int(row["seed"])) for row in read(options.results)}
    wanted = [(task, spec, seed) for seed in options.seeds for task in options.tasks for spec in options.models or TASKS[task]]
    jobs = [job for job in wanted if job not in have]
    if options.workers * options.gpus > 1:
        spread(jobs, options)
        return
    torch.backends.cudnn.benchmark = True  # shapes repeat
    made_by = provenance()
    for task, spec, seed in jobs:
        if late(options):
            return
        rows = trained_and_tested(task, spec, seed, options)
        append(options.results, COLUMNS, [row | made_by for row in rows])
        for row in rows:
            if row["group"] == ALL:
                print("\t".join(str(row.get(c, "")) for c in COLUMNS[:-3]), flush=True)


if __name__ == "__main__":
    options = arguments()
    main(options)
