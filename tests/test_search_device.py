"""What a device does: encode, search, add, evaluate; without torch and without a network; and refusals."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from smidgen import cli
from smidgen.errors import UserError
from smidgen.report import write_report
from smidgen.search.encoder import open_encoder
from smidgen.search.features import Feature, Query, read_features, write_features
from smidgen.search.folder import FEATURES, INDEX, SETTINGS
from smidgen.search.fusion import words
from smidgen.search.index import Index, quantized
from smidgen.search.searcher import Searcher, Settings, settle

WIDTH, LENGTH = 24, 16
CATALOGUE = (
    Feature("night_light", "Night Light", "Tints the screen amber", ("blue light", "eyes"), "Settings > Display"),
    Feature("hotspot", "Mobile hotspot", "Shares the connection with other devices", ("tethering",), "Settings > Network"),
    Feature("headphones", "Headphones", "Pairs wireless ones", ("bluetooth", "earbuds"), "Settings > Connected devices"),
    Feature("text_size", "Text size", "Letters larger or smaller", ("font", "big"), "Settings > Display"),
    Feature("ringtone", "Ringtone", "The tune of a call", ("melody", "sound"), "Settings > Sound"),
    Feature("saver", "Battery saver", "Makes a charge last longer", ("power",), "Settings > Battery"),
)
MEANS = {  # words that mean a feature, and are not in its texts
    "night_light": "read dark hurt evening", "hotspot": "laptop internet train", "headphones": "music listen jogging",
    "text_size": "grandma glasses tiny", "ringtone": "ring hear phone", "saver": "empty charger noon",
}  # fmt: skip
QUERIES = (
    Query("my eyes hurt when I read in the evening", ("night_light",)),
    Query("get my laptop on the internet in the train", ("hotspot",)),
    Query("listen to music while jogging outside", ("headphones",)),
    Query("grandma needs glasses for the tiny menus", ("text_size",)),
    Query("hotspot", ("hotspot",), "keyword"),
    Query("tetherng", ("hotspot",), "typo"),
    Query("how do I boil a potato", (), "none"),
    Query("who won the cup final", (), "none"),
)
BLOCKED = """
import socket, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "sentence_transformers", "safetensors", "scipy", "sklearn"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
def refuse(*a, **k):
    raise OSError("the network is blocked")
sys.meta_path.insert(0, Block())
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from smidgen.cli import main
code = main(sys.argv[1:])
assert not {"torch", "transformers"} & set(sys.modules)
sys.exit(code)
"""


def tokenizer() -> Tokenizer:
    """WordPiece of the words used here and single letters, q and z left out."""
    text = " ".join([*(words(f) for f in CATALOGUE), *(q.query for q in QUERIES if q.kind != "typo"), *MEANS.values()])
    letters = [c for c in "abcdefghijklmnoprstuvwxy"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in letters)]
    normal = normalizers.BertNormalizer()
    pieces += sorted({w for w, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(normal.normalize_str(text))} - set(pieces))
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normal, pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def table(made: Tokenizer) -> np.ndarray:
    """A vector per piece: words of a feature point its way, all other pieces one other way and hardly; [CLS] and [SEP] nowhere."""
    v = np.random.default_rng(0).normal(size=(made.get_vocab_size(), WIDTH)) * 0.005
    v[:, len(CATALOGUE)] += 0.05
    v[[2, 3]] = 0
    for i, feature in enumerate(CATALOGUE):
        for word in f"{feature.title} {' '.join(feature.keywords)} {MEANS[feature.id]}".lower().split():
            v[made.token_to_id(word), i] += 1
    return v.astype(np.float32)


def network(v: np.ndarray) -> onnx.ModelProto:
    """Mean of the rows of the real pieces, of length 1: what an exported student has around its layers."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["rows", "mask3"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
        helper.make_node("LpNormalization", ["summed"], ["vectors"], axis=-1, p=2),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "length"]) for name in ("input_ids", "attention_mask")]
    output = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", WIDTH])
    constants = {"table": v, "last": np.array([-1]), "middle": np.array([1])}
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "bag", inputs, [output], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_folder(folder: Path, kind: str = "onnx") -> Path:
    """A model's folder, as `smidgen search distill` leaves one."""
    folder.mkdir(parents=True)
    made = tokenizer()
    v = table(made)
    made.save(str(folder / "tokenizer.json"))
    described = {"version": 1, "kind": kind, "width": WIDTH, "length": LENGTH, "vocabulary": len(v), "layers": 0, "bits": 32, "lift": 1.1}
    (folder / "encoder.json").write_text(json.dumps(described))
    if kind == "onnx":
        onnx.save(network(v), folder / "encoder.onnx")
    else:
        codes, scale = quantized(v)
        np.savez(folder / "encoder.npz", codes=codes, scale=scale)
    write_features(folder / FEATURES, CATALOGUE)
    encoder = open_encoder(folder)
    Index.of([encoder(f.views()) for f in CATALOGUE], [words(f) for f in CATALOGUE]).write(folder / INDEX)
    settle(folder, QUERIES)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Read only."""
    return make_folder(tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(params=["onnx", "static"])
def folder(tmp_path, request) -> Path:
    """One to spoil."""
    return make_folder(tmp_path / "model", request.param)


@pytest.fixture
def smidgen(capsys, tmp_path, monkeypatch):
    """(*arguments) -> exit code, standard output and error of `smidgen search`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = cli.main(["search", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def queries(path: Path) -> Path:
    return lines(path, [{"query": q.query, "relevant": list(q.relevant), "kind": q.kind} for q in QUERIES])


# --- encoders --------------------------------------------------------------------------------------------------------


def test_network_and_table_make_the_same_vectors(tmp_path):
    """The bag of words in ONNX is the static tier but for the rounding."""
    network_of, static = (open_encoder(make_folder(tmp_path / kind, kind)) for kind in ("onnx", "static"))
    texts = [q.query for q in QUERIES]
    a, b = network_of(texts), static(texts)
    assert a.shape == b.shape == (8, WIDTH) and ((a * b).sum(1) > 0.999).all()
    assert np.linalg.norm(a, axis=1) == pytest.approx(1, abs=1e-5) and np.linalg.norm(b, axis=1) == pytest.approx(1, abs=1e-5)
    assert static(["dark read"]) == pytest.approx(static(["read dark"]), abs=1e-6), "word order says nothing"


def test_long_texts_are_cut_as_the_network_wants_them(made):
    encoder = open_encoder(made)
    fits = " ".join(["read"] * (LENGTH - 2))
    assert (encoder([fits]) == encoder([fits + " hotspot" * 50])).all()


def test_what_the_vocabulary_does_not_know_is_like_nothing(folder):
    encoder = open_encoder(folder)
    assert not encoder(["調光 設定", "zzz qqq", ""]).any()
    answer = Searcher.open(folder)("設定を調光")
    assert not answer.fits and answer.confidence == 0


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q.query)
def test_sentences_keywords_typos_and_nothing(folder, query):
    answer = Searcher.open(folder)(query.query)
    assert len(answer.hits) == len(CATALOGUE) and [h.score for h in answer.hits] == sorted((h.score for h in answer.hits), reverse=True)
    if query.kind == "none":
        assert not answer.fits
    else:
        assert answer.fits and answer.hits[0].feature.id == query.relevant[0]


def test_examples_are_short_sentences_answered_right(made):
    settings = Settings.read(made / SETTINGS)
    assert len(settings.examples) == 3 and set(settings.examples) <= {q.query for q in QUERIES if q.kind == "contextual"}
    assert settings.calibration is not None and settings.calibration.answerable == 6 and settings.calibration.none == 2


def test_query_prints_the_way_there(smidgen, made):
    code, out, _ = smidgen("query", made, "my eyes hurt when I read", "--count", 2)
    first, way, *rest = out.splitlines()
    assert (
        code == 0
        and first.split(maxsplit=2)[0] == "1"
        and first.endswith("Night Light")
        and way.strip() == "Settings > Display > Night Light"
    )
    assert len(rest) == 2
    code, out, _ = smidgen("query", made, "boil a potato")
    assert code == 0 and out.startswith("nothing fits; the closest is Settings > ")


def test_query_as_json(smidgen, made):
    code, out, _ = smidgen("query", made, "tetherng", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["hits"][0]["id"] == "hotspot" and found["hits"][0]["path"] == "Settings > Network"
    assert set(found["hits"][0]) == {"id", "title", "summary", "path", "score"} and 0 <= found["confidence"] <= 1


def test_answers_without_torch_and_without_a_network(folder, tmp_path):
    """A fresh process in which importing torch, or reaching for the network, is an error."""
    added = lines(tmp_path / "new.jsonl", [{"id": "torch", "title": "Noon"}])
    for arguments in (["query", folder, "my eyes hurt", "--json"], ["add", folder, added], ["query", folder, "noon", "--json"]):
        done = subprocess.run([sys.executable, "-c", BLOCKED, "search", *map(str, arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hits"][0]["id"] == "torch"


def test_the_block_blocks():
    """The negative control of the test above."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.replace("from smidgen.cli import main", "import torch")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "blocked: torch" in done.stderr


# --- adding ----------------------------------------------------------------------------------------------------------


def test_added_features_are_found_and_the_old_ones_stay(smidgen, folder, tmp_path):
    old = Searcher.open(folder)
    u = old.encoder(["listen to music"])[0]
    new = lines(
        tmp_path / "new.jsonl", [{"id": "equalizer", "title": "Music sound", "path": "Settings > Sound"}, {"id": "x", "title": "Train"}]
    )
    code, out, _ = smidgen("add", folder, new)
    found = json.loads(out)
    assert code == 0 and found["added"] == 2 and found["features"] == 8 and found["index_bytes"] == (folder / INDEX).stat().st_size
    searcher = Searcher.open(folder)
    assert searcher("music sound").hits[0].feature.id == "equalizer"
    assert (searcher.index.scores(u)[:6] == old.index.scores(u)).all() and len(searcher.features) == 8
    assert sorted(f.name for f in folder.iterdir() if "partial" in f.name) == []


def test_a_new_feature_stands_by_its_texts_and_its_examples(smidgen, folder, tmp_path):
    """Without examples the unit mean of its views, lifted; with them that mean as it is, and the unit mean of the examples."""
    feature = Feature("torch", "Torch", "Dark places", path="Settings > Display")
    new = lines(tmp_path / "new.jsonl", [feature.row()])
    asked = lines(tmp_path / "asked.jsonl", [{"query": "charger noon", "relevant": ["torch"]}, {"query": "empty", "relevant": ["torch"]}])
    index, encoder = folder / INDEX, open_encoder(folder)
    before = index.read_bytes()
    unit = [v / np.linalg.norm(v) for v in (encoder(feature.views()).mean(0), encoder(["charger noon", "empty"]).mean(0))]
    for options, expected in (((), [1.1 * unit[0]]), (("--queries", asked), unit)):
        index.write_bytes(before)
        assert smidgen("add", folder, new, *options)[0] == 0
        read = Index.read(index)
        start = int(read.starts[-2])
        assert read.codes[start:] * read.scales[start:, None] == pytest.approx(np.array(expected), abs=0.01)
    assert Searcher.open(folder)("charger noon").hits[0].feature.id in ("torch", "saver")
    code, _, err = smidgen("add", folder, lines(tmp_path / "n2.jsonl", [{"id": "n", "title": "N"}]), "--queries", asked)
    assert code == 2 and "'torch', which is no id of a feature" in err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "saver", "title": "Again"}], "feature 1: id 'saver' is in .*features.jsonl already"),
        ([{"id": "a", "title": "A"}, {"id": "a", "title": "B"}], "id 'a' of feature 2 is that of feature 1"),
        ([{"id": "a", "summary": "no name"}], "line 1: a feature without title"),
        ([], "no features"),
    ],
)
def test_what_is_not_added(smidgen, made, tmp_path, rows, message):
    before = (made / INDEX).read_bytes(), (made / FEATURES).read_bytes()
    code, _, err = smidgen("add", made, lines(tmp_path / "new.jsonl", rows))
    assert code == 2 and re.search(message, err), err
    assert before == ((made / INDEX).read_bytes(), (made / FEATURES).read_bytes())


def test_an_addition_cut_short_is_as_if_it_had_not_begun(smidgen, folder, tmp_path, monkeypatch):
    """features.jsonl has the new line, the index has not: readers go by the index, and the next addition puts it right."""
    new = lines(tmp_path / "new.jsonl", [{"id": "new", "title": "Train"}])

    def power_cut(index, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Index, "write", power_cut)
        code, _, err = smidgen("add", folder, new)
    assert code == 2 and "interrupted" in err and len(read_features(folder / FEATURES)) == 7
    assert len(Searcher.open(folder).features) == 6
    code, out, _ = smidgen("add", folder, new)
    assert code == 0 and json.loads(out)["features"] == 7 and len(read_features(folder / FEATURES)) == 7


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_ends_in_the_figures(smidgen, made, tmp_path):
    """Every answer is right here; figures by hand."""
    code, out, _ = smidgen("evaluate", made, queries(tmp_path / "queries.jsonl"), "--output", "run", "--timed", 20)
    assert code == 0
    figures = json.loads(out.splitlines()[-1])
    right = {"hit@1": 1, "hit@3": 1, "hit@5": 1, "hit@10": 1, "mrr@10": 1, "ndcg@10": 1}
    assert all(figures[kind] == right for kind in ("contextual", "keyword", "typo", "all"))
    assert figures["none"] == {"auroc": 1, "answer_rate": 1, "false_show": 0}
    assert 0 < figures["latency_ms_p50"] <= figures["latency_ms_p95"] and figures["queries"]["none"] == 2
    files = [f for f in made.iterdir() if f.suffix != ".md"]
    assert figures["size_bytes"] == sum(f.stat().st_size for f in files) == sum(figures["size_bytes_by_file"].values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 1, 1, 1, 1, 1, None, None]
    page = write_report([tmp_path / "run"]).read_text()
    assert all(words in page for words in ("Nothing fits", "contextual", "index.smi", "1.000", "p95"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == figures


def test_the_page_of_a_distillation(tmp_path):
    """Every step has a row in one table; a damaged one is refused by the file."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("search:\n  distill:\n    layers: 3\noutput: null\n")
    (run / "environment.json").write_text(json.dumps({"job": "search distill"}))
    steps = [{"step": "teacher", "contextual mrr@10": 0.5712, "size_bytes": 90_868_376}, {"step": "written", "overlap@10": 0.93}]
    metrics = {"costs": steps, "size_bytes_by_file": {"index.smi": 300_000}, "calibration": {"answer_rate": 0.95, "false_show": 0.125}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = write_report([run]).read_text()
    assert all(words in page for words in ("What every step cost", "0.571", "90.87", "0.930", "weights rounded", "0.125", "index.smi"))
    (run / "metrics.json").write_text(json.dumps({"costs": [1]}))
    with pytest.raises(UserError, match=r"metrics\.json: damaged, 'costs'"):
        write_report([run])


def test_ranks_are_those_of_the_first_relevant_feature(smidgen, made, tmp_path):
    scores = Searcher.open(made).scores("listen to music")
    order = [CATALOGUE[i].id for i in np.argsort(-scores, kind="stable")]
    asked = lines(tmp_path / "q.jsonl", [{"query": "listen to music", "relevant": [order[4], order[2]]}])
    code, out, _ = smidgen("evaluate", made, asked, "--output", "run", "--timed", 1)
    figures = json.loads(out)
    assert code == 0 and figures["contextual"]["mrr@10"] == pytest.approx(1 / 3) and figures["contextual"]["hit@1"] == 0
    assert json.loads((tmp_path / "run" / "steps.jsonl").read_text())["rank"] == 3 and "auroc" not in figures["none"]


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "the query is empty"),
        ("  \n ", "the query is empty"),
        ("x" * 10_000, "has 10,000 characters, 1,000 at most"),
        ("half \udce9", "not text"),
    ],
    ids=["empty", "spaces", "endless", "half a character"],
)
def test_queries_that_are_none(smidgen, made, query, message):
    code, out, err = smidgen("query", made, query)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "query", ["x" * 1000, "눈이 아파요", "👀😴", "' OR 1=1 --", "\x00\x01", "eyes " * 200, "../../etc/passwd", "<script>"]
)
def test_queries_that_are_odd_have_an_answer(folder, query):
    answer = Searcher.open(folder)(query, 3)
    assert len(answer.hits) == 3 and all(np.isfinite(hit.score) for hit in answer.hits)


@pytest.mark.parametrize("name", [FEATURES, "tokenizer.json", "encoder.json", "encoder", INDEX, SETTINGS])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "other"])
def test_damaged_folders_are_refused_by_the_file(smidgen, folder, name, damage):
    path = next(f for f in folder.iterdir() if f.name == name or (name == "encoder" and f.suffix in (".onnx", ".npz")))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "other": b"\x89PNG\r\n\x1a\n not this"}[damage])
    code, out, err = smidgen("query", folder, "eyes")
    assert code == 2 and out == "" and path.name in err and err.count("\n") == 1, err


def test_parts_that_do_not_fit_together(smidgen, folder, tmp_path):
    index = Index.read(folder / INDEX)
    Index.of([np.ones((1, WIDTH + 1))] * 6, ["x"] * 6).write(folder / INDEX)
    code, _, err = smidgen("query", folder, "eyes")
    assert code == 2 and f"vectors of {WIDTH + 1} numbers, the encoder makes {WIDTH}" in err
    index.extended([np.ones((1, WIDTH))], ["more"]).write(folder / INDEX)
    code, _, err = smidgen("query", folder, "eyes")
    assert code == 2 and "holds 6 of the 7 features" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "nowhere", "eyes"), "no such folder: nowhere"),
        (("query", ".", "eyes"), "no index.smi in it"),
        (("query", "MODEL", "eyes", "--count", "0"), "--count must be at least 1"),
        (("evaluate", "MODEL", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("evaluate", "MODEL", "QUERIES", "--timed", "0"), "--timed"),
        (("serve", "MODEL", "--port", "70000"), "--port must be between"),
        (("serve", "MODEL", "--host", "no.such.host.invalid"), "cannot listen"),
    ],
)
def test_what_cannot_be(smidgen, made, tmp_path, arguments, message):
    asked = queries(tmp_path / "queries.jsonl")
    code, _, err = smidgen(*({"MODEL": made, "QUERIES": asked}.get(a, a) for a in arguments))
    assert code == 2 and message in err, err


def test_queries_about_features_it_does_not_have(smidgen, made, tmp_path):
    asked = lines(tmp_path / "q.jsonl", [{"query": "eyes", "relevant": ["unheard_of"]}])
    code, _, err = smidgen("evaluate", made, asked, "--output", tmp_path / "run")
    assert code == 2 and "query 1" in err and "unheard_of" in err and not (tmp_path / "run" / "metrics.json").exists()


def test_without_a_threshold_everything_is_shown(folder):
    Settings(0.4).write(folder / SETTINGS)
    answer = Searcher.open(folder)("boil a potato")
    assert answer.fits and answer.confidence is None
    with pytest.raises(UserError, match="at least one"):
        Searcher.open(folder)("eyes", 0)
