import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smidgen import cli, plots
from smidgen.errors import UserError
from smidgen.report import write_report
from smidgen.report.comparison import best, run_names
from smidgen.report.finished import Finished
from smidgen.report.quantization import sample, short_names
from smidgen.report.words import flatten, label, metric_of, number, ratio

LAYERS = {"self_attn.q_proj": "query", "self_attn.o_proj": None, "mlp.down_proj": None}
CONFIG = "model: tiny\nmethod: {method}\nevaluate:\n- wiki.txt\noutput: null\nboa:\n  damp: {damp}\n"


def quantize_run(folder: Path, method: str = "boa", damp: float = 0.01, blocks: int = 3, **changes) -> Path:
    """The files of a finished run of `smidgen quantize`, made by hand."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(method=method, damp=damp))
    environment = {"job": "quantize", "python": "3.11.7", "command": ["smidgen", "quantize", "my model"], "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = []
    for block in range(blocks):
        for i, (layer, role) in enumerate(LAYERS.items()):
            row = {"block": block, "layer": layer, "role": role, "relative_error": 0.1 + 0.01 * i, "seconds": 0.25}
            rows.append(row if method == "rtn" else row | {"loss": 0.5, "sqnr_db": 20.0 - i - block})
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {
        "method": method,
        "bits": 3,
        "group": None,
        "symmetric": False,
        "perplexity": {"wiki.txt": 18.734},
        "perplexity_float": {"wiki.txt": 14.02},
        "size_bytes": 100_900_000,
        "size_bytes_float": 269_060_552,
        "bits_per_weight": 3.3125,
        "quantize_seconds": 96.41,
        "peak_memory_bytes": 815_345_678,
        "tokens": 32768,
        "seed": 1234,
        "model": "tiny",
        "high_precision": "embeddings and head",
    }
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    samples = {"before": {"Once upon a time": " there was a king"}, "after": {"Once upon a time": " there was a the the"}}
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def other_run(folder: Path, job: str, **metrics) -> Path:
    """A run of another job, without steps or samples."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"output: {folder}\n")
    (folder / "environment.json").write_text(json.dumps({"job": job}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def page_of(*folders: Path) -> str:
    return write_report(list(folders)).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)).split())


class Addresses(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]


def test_shows_a_quantized_model(tmp_path):
    page = page_of(quantize_run(tmp_path / "run"))
    text = text_of(page)
    assert "tiny BoA, 3 bits, a scale per row, with zero points" in text
    assert "perplexity, wiki.txt 14.02 18.73 1.336×" in text
    assert "size (MB) 269.1 100.9 0.3750×" in text
    for fact in ("per quantized weight 3.312", "time 96.41 s", "memory 815.3 MB", "tokens 32,768", "seed 1234", "embeddings and head"):
        assert fact in text
    assert "mlp.down_proj 2 16.00" in text  # the weakest: 20 - 2 - 2 dB
    assert f"smidgen quantize --config {tmp_path / 'run'}/config.yaml" in text
    assert "smidgen quantize &#39;my model&#39;" in text
    assert "torch 2.13.0" in text and "damp: 0.01" in text
    assert "SQNR (dB)" in page and page.count("<svg") == 2


def test_parts_samples_after_the_last_common_word():
    assert sample("p", " there was a king", " there was a kind") == sample("p", "there was a king", "there was a kind")
    parted = sample("p", "there was a king", "there was a kind")
    assert (parted.shared, parted.before, parted.after) == ("there was a ", "king", "kind")
    assert sample("p", "same text", "same text").shared == "same text"


def test_rtn_is_told_by_the_error_of_its_weights(tmp_path):
    page = page_of(quantize_run(tmp_path / "run", method="rtn"))
    assert "relative error" in page
    assert "SQNR" not in page


def test_needs_no_other_file(tmp_path):
    runs = [quantize_run(tmp_path / "a"), quantize_run(tmp_path / "b", bits_per_weight=4.0)]
    for page in (page_of(runs[0]), page_of(*runs)):
        addresses = Addresses()
        addresses.feed(page)
        assert all(a.startswith(("#", "data:,")) for a in addresses.found)
        assert not addresses.tags & {"script", "img", "iframe", "object"}
        assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_escapes_what_comes_from_files(tmp_path):
    evil = "<script>alert('$1$')</script>"
    run = quantize_run(tmp_path / "run", model=evil, perplexity={evil: 2.0}, high_precision=evil, bits_per_weight=2.5)
    (run / "config.yaml").write_text(f"model: {evil}\n")
    (run / "steps.jsonl").write_text(json.dumps({"block": 0, "layer": evil, "sqnr_db": 3.0, "seconds": 1.0}) + "\n")
    (run / "samples.json").write_text(json.dumps({"before": {evil: evil}, "after": {evil: evil + "!"}}))
    other = quantize_run(tmp_path / "_other", model=evil, perplexity={evil: 3.0})
    for page in (page_of(run), page_of(run, other)):
        assert "<script" not in page
        assert "&lt;script&gt;alert" in page


def test_the_same_files_give_the_same_page(tmp_path):
    runs = [quantize_run(tmp_path / "a"), quantize_run(tmp_path / "b", bits_per_weight=4.0)]
    for folders in (runs[:1], runs):
        assert page_of(*folders) == page_of(*folders)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_with_nothing_but_metrics(tmp_path):
    run = quantize_run(tmp_path / "run", size_bytes=None, perplexity={"wiki.txt": math.inf})
    (run / "steps.jsonl").write_text("")
    (run / "samples.json").unlink()
    text = text_of(page_of(run))
    assert "perplexity, wiki.txt 14.02 ∞ –" in text
    assert "size (MB) 269.1 – –" in text


def test_evaluate_and_unknown_jobs(tmp_path):
    text = text_of(
        page_of(other_run(tmp_path / "e", "evaluate", model="m", perplexity={"a": 5.0}, tokens={"a": 512}, size_bytes=1_500_000))
    )
    assert "text perplexity tokens a 5.000 512" in text and "size 1.500 MB" in text
    text = text_of(page_of(other_run(tmp_path / "s", "search", hit_at_10=0.5, latency={"p50": 2.25}, names=["a", "b"])))
    assert "hit at 10 0.5000 latency, p50 2.250 names a, b" in text


def test_repeats_into_a_new_folder_where_the_old_was_named(tmp_path):
    run = other_run(tmp_path / "run", "search", mrr=0.5)
    assert f"smidgen search --config {run}/config.yaml" in text_of(page_of(run))


def test_comparison_marks_the_best(tmp_path):
    a = quantize_run(tmp_path / "20261121-201503-a", "boa", perplexity={"wiki.txt": 18.7, "only a": 1.0})
    b = quantize_run(tmp_path / "20261121-201503-b", "gptq", perplexity={"wiki.txt": 15.2}, size_bytes=120e6, damp=0.02)
    page = write_report([a, b])
    assert page == tmp_path / "report.html"
    cells = re.findall(r'<th scope="row">(.*?)</th>\s*<td class="(.*?)">(.*?)</td>\s*<td class="(.*?)">(.*?)</td>', page.read_text())
    rows = {name: [(value, "best" in mark) for mark, value in ((m1, v1), (m2, v2))] for name, m1, v1, m2, v2 in cells}
    assert rows["perplexity, wiki.txt"] == [("18.70", False), ("15.20", True)]
    assert rows["perplexity, only a"] == [("1.000", False), ("–", False)]
    assert rows["size (MB)"] == [("100.9", True), ("120.0", False)]
    assert rows["bits per quantized weight"] == [("3.312", False), ("3.312", False)]
    text = text_of(page.read_text())
    assert "seed 1234" in text  # shared, so said once
    assert "method: boa boa: damp: 0.01" in text and "method: gptq boa: damp: 0.02" in text


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("perplexity", [2.0, 1.0, 1.0], [False, True, True]),
        ("accuracy", [0.5, 0.75, None], [False, True, False]),
        ("latency_ms_p50", [3, math.inf, math.nan], [True, False, False]),
        ("perplexity_float", [2.0, 1.0], [False, False]),
        ("seed", [2, 1], [False, False]),
        ("size_bytes", [5, 5], [False, False]),
    ],
)
def test_best(metric, values, expected):
    assert best(metric, values) == expected


def test_charts_of_a_comparison(tmp_path):
    boa3 = quantize_run(tmp_path / "boa3", "boa", bits_per_weight=3.0)
    boa4 = quantize_run(tmp_path / "boa4", "boa", bits_per_weight=4.0, perplexity={"wiki.txt": 15.0})
    rtn = quantize_run(tmp_path / "rtn", "rtn", bits_per_weight=4.0, perplexity={"wiki.txt": math.inf})
    float_model = other_run(tmp_path / "float", "evaluate", perplexity={"wiki.txt": 14.02})
    page = page_of(boa3, boa4, rtn, float_model)
    assert page.count("<svg") == 2
    assert "Not drawn, for lack of a finite figure: 1 of the runs." in page
    assert "Query, key and value layers are left out" not in page
    gptq = quantize_run(tmp_path / "gptq", "gptq", bits_per_weight=4.0)
    assert "Query, key and value layers are left out" in page_of(boa3, gptq)
    assert "<svg" not in page_of(boa3, float_model)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", '{"model":\n "tiny",\n oops}', r"metrics\.json, line 3: damaged, not JSON"),
        ("metrics.json", "[]", r"metrics\.json, line 1: damaged, not a JSON object"),
        ("metrics.json", '{"perplexity": 3}', r"metrics\.json: damaged, 'perplexity'"),
        ("steps.jsonl", '{"block": 0, "layer": "a"}\n{"block": 0, "la', r"steps\.jsonl, line 2: damaged, not JSON"),
        ("steps.jsonl", '{"block": 0, "layer": "a"}\n{"step": 1}\n', r"steps\.jsonl, line 2: damaged, it lacks a block or layer"),
        ("steps.jsonl", b'{"block": 0, "layer": "a"}\n\xff\n', r"steps\.jsonl, line 2: damaged, not UTF-8"),
    ],
)
def test_names_the_damaged_file_and_line(tmp_path, name, text, message):
    run = quantize_run(tmp_path / "run")
    (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        write_report([run])
    assert not (run / "report.html").exists()


def test_refuses_what_is_no_finished_run(tmp_path):
    run = quantize_run(tmp_path / "run")
    with pytest.raises(UserError, match="no such run"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(UserError, match="is a file"):
        write_report([run / "config.yaml"])
    with pytest.raises(UserError, match="is not a finished run"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="given twice"):
        write_report([run, run / ".." / "run"])
    with pytest.raises(UserError, match=r"ends in \.html"):
        write_report([run], run / "metrics.json")
    (run / "metrics.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        write_report([run])


def test_command(tmp_path, capsys):
    a, b = quantize_run(tmp_path / "a"), quantize_run(tmp_path / "b")
    output = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(a), str(b), "--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"report": str(output), "runs": [str(a), str(b)]}
    assert output.exists() and not (tmp_path / "report.html").exists()
    assert cli.main(["report"]) == 2
    assert cli.main(["report", str(tmp_path / "c")]) == 2
    assert "no such run" in capsys.readouterr().err


def test_starts_without_torch():
    code = "import smidgen.report, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'matplotlib.pyplot')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [(140.23, "140.2"), (0.03125, "0.03125"), (32768, "32,768"), (123456.0, "1.2e5"), (None, "–"), (9.99999, "10.00"), (999.96, "1,000"),
     (12345.6, "12,346"), (0.0, "0.000"), (-0.0001, "-1.0e-4"), (math.nan, "not a number"), (True, "yes"), ([1, 2.5], "1, 2.500")],
)  # fmt: skip
def test_number(value, expected):
    assert number(value) == expected


def test_small_helpers(tmp_path):
    assert flatten({"a": {"b": 1}, "c": 2}) == {("a", "b"): 1, ("c",): 2}
    assert label(("perplexity", "wiki.txt")) == "perplexity, wiki.txt"
    assert label(("written", "gguf", "size_bytes")) == "written, gguf, size"
    assert metric_of(("written", "gguf", "size_bytes")) == "size_bytes" and metric_of(("perplexity", "a.txt")) == "perplexity"
    assert (ratio(2.0, 3), ratio(0.0, 1.0), ratio(None, 1.0)) == ("1.500×", "–", "–")
    assert short_names(["attn.c_attn[key]", "attn.c_proj", "mlp.c_proj"]) == {
        "attn.c_attn[key]": "c_attn[key]",
        "attn.c_proj": "attn.c_proj",
        "mlp.c_proj": "mlp.c_proj",
    }
    runs = [Finished.read(quantize_run(tmp_path / name)) for name in ("20261121-201503-a", "20261122-201503-a", "sub/20261121-201503-a")]
    assert run_names(runs[:1]) == ["a"]
    assert run_names(runs[:2]) == ["20261121-201503-a", "20261122-201503-a"]
    assert run_names(runs) == [str(run.folder.resolve()) for run in runs]


def test_plots_draw_gaps_odd_names_and_many_series():
    nan = math.nan
    svg = plots.by_block({"$a_{1": [(0, 1.0), (1, nan), (2, 3.0)], "_中文": [(0, nan)], "x" * 200: [(0, 2.0)]}, "error", 'a "title"')
    assert "$a_{1" in svg and "_中文" in svg and 'aria-label="a &quot;title&quot;"' in svg
    assert plots.by_block({str(i): [(0, float(i))] for i in range(40)}, "error", "many").count("<text") > 40
    assert "y" * 40 not in plots.bars({"y" * 40: 1.0, "z": 0.0}, "seconds", "long names")
    assert ">200<" in plots.perplexity_by_bits({"a": [(2.0, 1e3), (3.0, 15.0)]}, {"before": 14.0}, "logarithmic")


@pytest.mark.parametrize(("steps", "labels"), [((1, 2), ["1", "2"]), ((0, 3, 30), ["5", "10", "20"]), ((1, 10_000), ["1", "100", "10000"])])
def test_steps_are_labelled_with_plain_numbers(steps, labels):
    svg = plots.by_step({"loss": [(step, 1.0) for step in steps]}, "loss", "steps")
    assert all(f">{label}<" in svg for label in labels) and "mathdefault" not in svg


def test_names_below_small_pictures_are_cut_with_a_sign():
    svg = plots.thumbnails([("c" * 30, [("data:,", "", False)], [("data:,", "Arabic/arabic letter dad", True)])], "task")
    assert f">…{'c' * 19}<" in svg and ">…etter dad<" in svg


def test_colours_follow_the_page():
    svg = plots.by_block({"a": [(0, 1.0), (1, 2.0)]}, "error", "colours")
    template = (Path(plots.__file__).parent / "templates" / "report.html").read_text()
    assert all(f"--{variable}:" in template for variable in plots.VARIABLES.values())
    assert set(re.findall(r"(?<!, )#[0-9a-f]{6}\b", re.sub(r"url\(#\w+\)", "", svg))) == set()
