"""Train, distil, export: what is learnt and by how much, what students keep, the files a device reads, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search_bert import tiny

from smidgen.cli import main as cli
from smidgen.errors import UserError
from smidgen.run import Run
from smidgen.search import distill, teacher
from smidgen.search.bert import Bert, keep_layers, load, save
from smidgen.search.contrastive import Contrastive
from smidgen.search.distillation import Distillation, Material, narrowed, spread
from smidgen.search.encoder import open_encoder
from smidgen.search.export import ByteWords, bytes_of, export
from smidgen.search.features import Feature, Query, read_queries, write_features, write_queries
from smidgen.search.metrics import by_kind
from smidgen.search.relevance import relevance, sides
from smidgen.search.searcher import Searcher
from smidgen.search.static import components, pieces, static

NAMES = "alarm battery camera dim echo flash glove hotspot icon jack keyboard lock mute night option photo quiet ring sound theme".split()
SIGNS = "wake empty lens dark voice torch hand share tile plug type key hush moon pick snap calm bell loud look".split()
EXTRA = "my the is too how when please want".split()
STEPS = 60


def features() -> tuple[Feature, ...]:
    return tuple(Feature(name, name.title(), path="Settings > " + "AB"[i % 2]) for i, name in enumerate(NAMES))


def queries(seed: int = 0, each: int = 5) -> tuple[Query, ...]:
    """What is wanted is called by another word than the feature's: nothing but examples can tell."""
    random = np.random.default_rng(seed)
    rows = []
    for name, sign in zip(NAMES, SIGNS, strict=True):
        for _ in range(each):
            words = [*random.choice(EXTRA, 3, replace=False), sign]
            rows.append(Query(" ".join(random.permutation(words)), (name,)))
    return tuple(rows)


NONE = (Query("garlic volcano", (), "none"), Query("opera tomato", (), "none"))


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save(folder, tiny([*NAMES, *SIGNS, *EXTRA, "settings"], dropout=0.0))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_features(folder / "features.jsonl", features())
    write_queries(folder / "queries.jsonl", (*queries(), *NONE))
    write_queries(folder / "test.jsonl", (*queries(9, 2), *NONE))
    return folder


@pytest.fixture(scope="module")
def config(start, data) -> teacher.Config:
    return teacher.Config(
        data / "features.jsonl", queries=data / "queries.jsonl", teacher=str(start), epochs=40, batch=20, learning_rate=2e-3,
        precision="float32", device="cpu", interpolation=1.0, method=Contrastive(teaching=0.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> tuple[dict, Path]:
    with Run("search train", config, tmp_path_factory.mktemp("runs") / "teacher") as run:
        return teacher.main(config, run), run.folder


@pytest.fixture(scope="module")
def distilled(trained, data, tmp_path_factory):
    """(layers, options) -> metrics and the folder of the run."""
    made: dict = {}

    def command(layers: str, **options) -> tuple[dict, Path]:
        key = (layers, *sorted(options.items()))
        if key not in made:
            config = distill.Config(
                trained[1], layers=layers, vocabulary=200, steps=STEPS, batch=32, learning_rate=2e-3, texts=data / "features.jsonl",
                device="cpu", precision="float32", **({"width": 24} if layers == "static" else {}) | options,
            )  # fmt: skip
            with Run("search distill", config, tmp_path_factory.mktemp("runs") / layers) as run:
                made[key] = distill.main(config, run), run.folder
        return made[key]

    return command


def mrr(encoder, asked) -> float:
    found = relevance(encoder.encode([q.query for q in asked]), sides(encoder, features(), ())).numpy()  # by the features' own texts
    return by_kind(found, asked, features())["contextual"]["mrr@10"]


def test_examples_teach_what_words_cannot(trained, start):
    """Fresh queries, no word of which is in a feature's text: chance before (H_10 / 20 = 0.146), nearly all right after."""
    test = queries(9, 2)
    before, after = mrr(load(start), test), mrr(load(trained[1] / "artifact"), test)
    assert before < 0.35 and after > 0.9, (before, after)


def test_wrong_examples_teach_nothing(config, start, tmp_path):
    """Negative control: the same training with every query's answer drawn anew."""
    random = np.random.default_rng(0)
    wrong = [replace(q, relevant=(str(random.choice(NAMES)),)) for q in queries()]
    write_queries(tmp_path / "wrong.jsonl", wrong)
    with Run("search train", config, tmp_path / "run") as run:
        teacher.main(replace(config, queries=tmp_path / "wrong.jsonl", epochs=10), run)
    assert mrr(load(tmp_path / "run" / "artifact"), queries(9, 2)) < 0.35


def test_the_teachers_folder(trained):
    metrics, folder = trained
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [q.query for q in queries(9, 1)]
    theirs = sentence_transformers.SentenceTransformer(str(folder / "artifact"), device="cpu").encode(texts)
    np.testing.assert_allclose(load(folder / "artifact").encode(texts).numpy(), theirs, atol=1e-5)
    kept, held_out = (read_queries(folder / "artifact" / name, features()) for name in (teacher.TRAINED_ON, teacher.HELD_OUT))
    assert len(kept) == 90 and [q.kind for q in held_out].count("none") == 2 and len(held_out) == 12
    assert not {q.query for q in kept if q.relevant} & set() and metrics["interpolation"] == 1.0


def test_the_weight_is_chosen_by_features_held_out(config, tmp_path):
    few = replace(config, interpolation=None, epochs=2)
    with Run("search train", few, tmp_path / "run") as run:
        metrics = teacher.main(few, run)
    assert set(metrics["held_out_mrr"]) == set(teacher.WEIGHTS)
    assert metrics["held_out_mrr"][metrics["interpolation"]] == max(metrics["held_out_mrr"].values())


def test_folds_leave_features_out():
    kept, held_out = queries(), queries(1, 1)
    unseen = []
    for fold in range(teacher.FOLDS):
        left, parts = teacher.split(features(), kept, held_out, fold, 0)
        out = {q.relevant[0] for q in parts["unseen"]}
        assert len(out) == 4 and not out & {q.relevant[0] for q in (*left, *parts["seen"])}
        assert len(left) == 80 and len(parts["seen"]) == 16 and len(parts["unseen"]) == 24
        unseen += out
    assert sorted(unseen) == sorted(NAMES)


def test_the_same_command_gives_the_same_teacher(config, tmp_path):
    for name in "ab":
        with Run("search train", config, tmp_path / name) as run:
            teacher.main(replace(config, epochs=2), run)
    a, b = (load(tmp_path / name / "artifact").model.state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layers", ["1", "static"])
def test_a_student_keeps_what_its_teacher_knows(layers, distilled, trained):
    """Of MRR on fresh queries, at most 0.1 less than the teacher; before distillation it is far worse."""
    metrics, folder = distilled(layers)
    costs = {row["step"]: row for row in metrics["costs"]}
    assert costs["distilled"]["contextual mrr@10"] > costs["teacher"]["contextual mrr@10"] - 0.1
    assert costs["distilled"]["cosine"] > costs["smaller"]["cosine"] + 0.05
    assert costs["teacher"]["overlap@10"] == 1 and costs["teacher"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert costs["indexed"]["contextual mrr@10"] > costs["distilled"]["contextual mrr@10"] - 0.05
    assert metrics["size_bytes"] == sum(metrics["size_bytes_by_file"].values())
    assert metrics["calibration"]["none"] == 2 and (folder / "artifact" / "config.json").is_file()
    searcher = Searcher.open(folder)
    scores = np.stack([searcher.scores(q.query) for q in queries(9, 2)])
    assert by_kind(scores, queries(9, 2), features())["contextual"]["mrr@10"] > 0.8


@pytest.mark.parametrize("bits, least", [(32, 0.99999), (8, 0.98)])
def test_the_exported_network_is_the_network(bits, least, trained, tmp_path):
    """One text at a time and in batches."""
    encoder = load(trained[1] / "artifact")
    export(encoder, tmp_path, bits)
    encoder.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "encoder.json").write_text(json.dumps({"version": 1, "kind": "onnx", "width": 32, "length": encoder.length, "lift": 1.0}))
    texts = [q.query for q in queries(3, 5)] + ["night " * 60]
    ours, theirs = encoder.encode(texts).numpy(), open_encoder(tmp_path)(texts)
    assert (ours * theirs).sum(1).min() > least
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    ids, mask = encoder.tokens(texts[:7] + texts[-1:])
    batch = np.asarray(session.run(["vectors"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
    assert (batch * np.concatenate([theirs[:7], theirs[-1:]])).sum(1).min() > least, "padding does nothing"


def test_eight_bits_are_a_quarter_of_the_size(tmp_path):
    wide = replace(tiny(), model=Bert(replace(tiny().model.shape, width=128, inner=512)).eval())
    sizes = {}
    for bits in (32, 8):
        (tmp_path / str(bits)).mkdir()
        sizes[bits] = export(wide, tmp_path / str(bits), bits).stat().st_size
    assert sizes[8] < 0.35 * sizes[32]


def test_words_in_bytes():
    """For every row."""
    rows = torch.randn(9, 16) * torch.logspace(-3, 2, 9)[:, None]
    codes, scale = bytes_of(torch.cat([rows, torch.zeros(1, 16)]))
    assert ((rows - codes[:9] * scale[:9, None]).abs() <= scale[:9, None] / 2 * 1.0001).all()
    assert not codes[9].any() and torch.equal(bytes_of(2 * rows)[0], codes[:9])
    torch.testing.assert_close(ByteWords(rows)(torch.tensor([[3]]))[0, 0], codes[3] * scale[3])


def test_a_table_is_blind_to_order(trained):
    made = static(load(trained[1] / "artifact"), 8)
    assert torch.equal(made.encode(["night sound"]).sort().values, made.encode(["sound night"]).sort().values)
    torch.testing.assert_close(made.encode(["night my sound"]), made.encode(["sound night my"]))
    assert made.encode(["night"]).shape == (1, 8)


def test_a_table_of_all_directions_is_the_encoder_for_single_pieces(start):
    encoder = load(start)
    made = static(encoder, 32, torch.eye(32))
    single = pieces(encoder, encoder.tokenizer.get_vocab_size())
    number = encoder.tokenizer.token_to_id("night")
    torch.testing.assert_close(made.encode(["night"])[0], single[number], atol=1e-6, rtol=0)


def test_narrow_vectors_keep_the_cosines_that_matter():
    random = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(50, 6, generator=random) @ torch.randn(6, 40, generator=random), dim=1)
    basis = components(x, 6)
    torch.testing.assert_close(narrowed(x, basis) @ narrowed(x, basis).T, x @ x.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-5, rtol=0)


def test_what_a_student_reads_and_what_its_teacher_reads(start):
    material = Material.of(features(), queries(), [], load(start))
    random = np.random.default_rng(0)
    drawn = [material.draw(random) for _ in range(400)]
    labelled = [row for row in drawn if row[2] >= 0]
    assert all(meant == material.queries[number].query for _, meant, number in labelled)
    assert any(read != meant for read, meant, _ in labelled) and all(read == meant for read, meant, number in drawn if number < 0)
    assert 180 < len(labelled) < 260
    plain = [material.draw(random, 1.0) for _ in range(50)]
    assert all(read == meant and read in material.texts and number == -1 for read, meant, number in plain)


def test_layers_kept_are_spread():
    assert [spread(k, 6) for k in range(1, 7)] == [[0], [0, 5], [0, 2, 5], [0, 2, 3, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]]
    whole = tiny().model
    assert keep_layers(whole, spread(2, 2)).shape == whole.shape


def test_the_commands_end_in_a_line_of_json(config, tmp_path, capsys):
    options = ["--queries", str(config.queries), "--teacher", config.teacher, "--epochs", "1", "--interpolation", "0.5", "--device", "cpu"]
    assert cli(["search", "train", str(config.features), *options, "--output", str(tmp_path / "t")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["interpolation"] == 0.5
    options = ["--layers", "static", "--vocabulary", "150", "--width", "16", "--steps", "2", "--batch", "8", "--device", "cpu"]
    assert cli(["search", "distill", str(tmp_path / "t"), *options, "--output", str(tmp_path / "s")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["vocabulary"] == 121, "all that its alphabet allows"
    assert cli(["search", "query", str(tmp_path / "s"), "dark"]) == 0


def test_refusals(config, trained, data, tmp_path):
    def train(**options):
        with Run("search train", config, tmp_path / "refused") as run:
            return teacher.main(replace(config, **options), run)

    for options, message in (
        ({"epochs": 0}, "--epochs must be positive"),
        ({"interpolation": 2.0}, "--interpolation must be between 0 and 1"),
        ({"interpolation": 0.5, "folds": 3}, "--folds choose the interpolation"),
        ({"folds": 9, "interpolation": None}, "--folds must be between 1 and 5"),
        ({"lift": 5.0}, "--lift must be between 0.5 and 2"),
        ({"queries": None, "interpolation": None}, "without example queries no weight can be chosen"),
        ({"teacher": "nowhere"}, "no encoder nowhere"),
        ({"hold_out": 0.5}, "--hold-out must be"),
    ):
        with pytest.raises(UserError, match=message):
            train(**options)
    assert not (tmp_path / "refused" / "artifact").exists()

    def student(folder=trained[1], **options):
        texts = data / "features.jsonl"
        made = distill.Config(folder, device="cpu", **{"vocabulary": 200, "steps": 1, "texts": texts} | options)
        with Run("search distill", made, tmp_path / "none") as run:
            return distill.main(made, run)

    for options, message in (
        ({"layers": "3"}, "--layers 3: the teacher has 2"),
        ({"layers": "2", "width": 16}, "--width is of --layers static; 2 layers keep the teacher's"),
        ({"layers": "1", "steps": -1}, "--steps must not be negative"),
        ({"layers": "1", "learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"layers": "1", "texts": data / "nothing.txt"}, "--texts: no such file"),
        ({"layers": "static", "bits": 32}, "--bits 32 is for networks"),
        ({"layers": "1", "method": Distillation(texts=2.0)}, "--method.texts is a share"),
        ({"layers": "1", "vocabulary": 30}, "--vocabulary 30: characters and the pieces"),
        ({"layers": "1", "folder": data}, "no features.jsonl in it|is not a BERT|not the description"),
        ({"layers": "1", "held_out": data / "nothing.jsonl"}, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            student(**options)
    assert not (tmp_path / "none" / "artifact").exists()


def test_of_equal_weights_the_least_is_chosen():
    assert teacher.pick({0.0: 0.4, 0.5: 0.6, 1.0: 0.5}) == 0.5
    assert teacher.pick(dict.fromkeys((1.0, 0.5, 0.0), 0.5)) == 0.0
