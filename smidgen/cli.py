"""The command line: a table of commands, each imported only when it runs.

A command is a function that takes its config and returns its metrics; they are printed as one line of JSON, the
last on standard output. Everything else a command says goes to standard error.
"""

import difflib
import json
import logging
import os
import sys
from pathlib import Path

import yaml
from cyclopts import App, CycloptsError
from cyclopts.config import Yaml

from smidgen import __version__
from smidgen.errors import UserError

app = App(
    name="smidgen",
    help="Few bits, few labels, little data: small accurate models that run on a device.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.command("smidgen.quant.quantize:command", name="quantize", help="Quantize a language model, or another, and measure what is written.")
app.command("smidgen.quant.qat:command", name="qat", help="Train a language model for quantized weights and activations.")
app.command("smidgen.quant.statistics:command", name="collect", help="Collect a model's statistics once, to quantize to any bits later.")
app.command("smidgen.quant.evaluate:command", name="evaluate", help="Measure the perplexity of a model or artifact on texts.")
app.command("smidgen.quant.convert:command", name="convert", help="Write an artifact's integers in another runtime's format.")
app.command("smidgen.quant.generate:run_command", name="run", help="Continue a prompt in the runtime an artifact is for.")
app.command("smidgen.quant.generate:bench_command", name="bench", help="Measure an artifact in its runtime: speed, memory, perplexity.")
fewshot = App(name="fewshot", help="Classify images from a few labelled ones.", result_action="return_value")
app.command(fewshot)
fewshot.command("smidgen.fewshot.predict:command", name="predict", help="Classify images by folders of a few labelled ones; prints CSV.")
fewshot.command("smidgen.fewshot.train:command", name="train", help="Learn, over many small tasks, to learn from few labels.")
fewshot.command("smidgen.fewshot.evaluate:command", name="evaluate", help="Accuracy of a trained method on tasks of new classes.")
fewshot.command("smidgen.fewshot.export:command", name="export", help="Write a trained method as one file that a device runs.")
symbolic = App(name="symbolic", help="Answer questions with numbers in them by laying them out on a grid.", result_action="return_value")
app.command(symbolic)
symbolic.command("smidgen.symbolic.train:command", name="train", help="Learn a task from questions and answers.")
symbolic.command("smidgen.symbolic.evaluate:command", name="evaluate", help="Accuracy of a trained model, and what it does not answer.")
symbolic.command("smidgen.symbolic.solve:command", name="solve", help="Answer a question, or say why not; --explain draws the grid.")
symbolic.command("smidgen.symbolic.export:command", name="export", help="Write a trained model as ONNX, to run without torch.")
app.command("smidgen.refine.refine:app", name="refine", help="Clean, balance and augment labelled images, and prove that it helps.")
search = App(name="search", help="Describe what you need, get the feature.", result_action="return_value")
app.command(search)
search.command("smidgen.search.teacher:command", name="train", help="Learn from features and example queries which feature answers.")
search.command("smidgen.search.distill:command", name="distill", help="Make a learnt model small enough for a phone.")
search.command("smidgen.search.query:command", name="query", help="Find the features that answer a query, without torch.")
search.command("smidgen.search.serve:command", name="serve", help="A page that answers while one types, and its JSON API.")
search.command("smidgen.search.evaluate:command", name="evaluate", help="Measure quality, time and size on queries with known answers.")
search.command("smidgen.search.add:command", name="add", help="Add features to an index, without training.")
lab = App(name="lab", help="Controlled experiments.", result_action="return_value")
app.command(lab)
lab.command("smidgen.lab.ranges:command", name="ranges", help="Which way to write a learned range converges, oscillates or sticks.")
app.command("smidgen.report:command", name="report", help="Write a page that shows one run, or compares several.")
GROUPS = {group.name[0]: group for group in (fewshot, symbolic, search, lab)}  # commands of commands
EXTRAS = {
    "fewshot": "vision",
    "symbolic": "symbolic",
    "refine": "refine,vision",
    "search": "search-training",
}  # of pyproject.toml; others: quant


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 with one line on standard error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers imports torchao where it is installed, which warns of its own parts; torch's exporter of packages it can do without
    for chatty in ("torchao", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        tokens, recipe = split_recipe(tokens)
        check_names(tokens)
        if recipe is not None:
            check_recipe(recipe, tokens)
        app.config = [] if recipe is None else [Yaml(recipe, must_exist=True)]
        result = app(tokens, exit_on_error=False, print_error=False)
    except (UserError, CycloptsError) as error:
        return fail(" ".join(str(error).split()))
    except ImportError as error:
        extra = EXTRAS.get(tokens[0], "quant")
        return fail(f"this command needs the package {lacking(error)}: pip install 'smidgen[{extra}]'")
    except OSError as error:
        return fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("interrupted; nothing unfinished was kept")
    if isinstance(result, dict):
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def lacking(error: ImportError) -> str:
    """The package that is not installed; a module of our own, or a name that a module does not have, is no such case and raised again."""
    cause: BaseException | None = error
    while cause is not None:  # cyclopts raises its own of a command's module
        if isinstance(cause, ModuleNotFoundError) and cause.name and not cause.name.startswith("smidgen"):
            return cause.name.partition(".")[0]
        cause = cause.__cause__ or cause.__context__
    raise error


def check_names(arguments: list[str]) -> None:
    """Refuses a command that is not there; cyclopts would import all of them first, and torch with them."""
    place = app
    for argument in arguments[:2]:
        if argument.startswith("-"):
            return
        names = [name for name in place if not name.startswith("-")]
        if argument not in names:
            alike = difflib.get_close_matches(argument, names, 1)
            guess = f"did you mean '{alike[0]}'? " if alike else ""
            raise UserError(f"no command '{argument}'; {guess}there are {', '.join(names)}")
        if argument not in GROUPS or place is not app:
            return
        place = GROUPS[argument]


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


def fail(message: str) -> int:
    """One line on standard error."""
    sys.stderr.write(f"smidgen: {message}\n")
    return 2


def split_recipe(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Takes `--config recipe.yaml` out of the arguments; the command line overrides what it holds."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = Path(value if equals else (arguments[i + 1 : i + 2] or [""])[0])
            if not path.is_file():
                raise UserError(f"--config: no such file: {path}" if path.name else "--config needs a file of options, RUN/config.yaml")
            return arguments[:i] + arguments[i + (1 if equals else 2) :], path
    return arguments, None


def check_recipe(recipe: Path, arguments: list[str]) -> None:
    """Refuses a recipe without options of this command; they are nested under its name, as in RUN/config.yaml."""
    try:
        options = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {recipe} is not YAML: {error}") from error
    for name in arguments[: 2 if arguments[:1] and arguments[0] in GROUPS else 1]:
        if not (isinstance(options, dict) and isinstance(options.get(name), dict)):
            found = f"it begins with {', '.join(map(str, options))}" if isinstance(options, dict) else "it holds no options"
            raise UserError(f"--config {recipe} has nothing nested under '{name}', the name of the command; {found}")
        options = options[name]
