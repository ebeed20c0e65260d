"""The exact back end on layouts made by hand, placements against enumeration, decoders, calibrated abstention."""

import doctest
import itertools
import re

import numpy as np
import pytest

import smidgen.symbolic.confidence
import smidgen.symbolic.exact
import smidgen.symbolic.layout
from smidgen.symbolic.confidence import NEVER, calibrate, calibration_error, platt, threshold, wilson
from smidgen.symbolic.decoders import answers, from_slots, log_softmax, to_slots
from smidgen.symbolic.decoders import read as read_answers
from smidgen.symbolic.exact import Rule, answer, learn, read, rule, shortened
from smidgen.symbolic.layout import EMPTY, cells, weights
from smidgen.symbolic.tasks import NLP, NOOP, TLU, open_task
from smidgen.symbolic.tasks.addition import given
from smidgen.symbolic.vocabulary import END, PAD, Vocabulary


def aligned(text: str) -> list[int]:
    """An alignment a person would give: numbers in rows of their own, all else left out; the last is the end token's."""
    actions = [NOOP] * (len(text) + 1)
    for found in re.finditer(r"(?<!\d)-?\d+", text):
        actions[found.start()] = NLP
        actions[found.start() + 1 : found.end()] = [TLU] * (found.end() - found.start() - 1)
    return actions


def laid_out(text: str, actions: list[int], rows: int = 3, columns: int = 25, sure: float = 1.0):
    """Cells of a question whose actions are that sure."""
    return cells(weights(probable(actions, sure)[None], rows, columns)[0])


def probable(actions: list[int], sure: float = 1.0) -> np.ndarray:
    """Probabilities."""
    return np.where(np.eye(3)[actions] > 0, sure, (1 - sure) / 2)


def seen(text: str, actions: list[int] | None = None, sure: float = 1.0):
    """The reading of a question on the paper's grid."""
    return read(text, probable(aligned(text) if actions is None else actions, sure), 3, 25)


def hard(actions: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    """Which token is where, by nested lists; an update onto no list at all opens the top one, as on a grid whose rows are always there."""
    grid: list[list[int]] = []
    for t, action in enumerate(actions):
        if action == NLP or (action == TLU and not grid):
            grid.insert(0, [t])
        elif action == TLU:
            grid[0].insert(0, t)
    out = np.full((rows, columns), EMPTY)
    for h, row in enumerate(grid[:rows]):
        for w, t in enumerate(row[:columns]):
            out[h, w] = t
    return out


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (1, 1), (4, 8)])
def test_weights_are_the_mean_of_all_certain_grids(rows, columns):
    p = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    expected = np.zeros((5, rows, columns))
    for actions in itertools.product(range(3), repeat=5):
        probability = np.prod([p[t, a] for t, a in enumerate(actions)])
        grid = hard(actions, rows, columns)
        for t in range(5):
            expected[t] += probability * (grid == t)
    np.testing.assert_allclose(weights(p[None], rows, columns)[0], expected, atol=1e-14)
    occupied = weights(p[None], rows, columns)[0].sum(0)
    assert occupied[0, 0] == pytest.approx(1 - np.prod(p[:, NOOP]))


def test_weights_are_those_of_the_module():
    torch = pytest.importorskip("torch")
    seq2grid = pytest.importorskip("smidgen.symbolic.seq2grid")
    p = np.random.default_rng(1).dirichlet(np.ones(3), (4, 30))
    np.testing.assert_allclose(weights(p, 3, 5), seq2grid.weights(torch.from_numpy(p), 3, 5).numpy(), atol=1e-14)


def test_the_toy_lies_as_given():
    grid = laid_out("582 13", given("582 13"))
    text = "582 13$"
    assert ["".join(text[t] for t in row if t != EMPTY) for row in grid.token] == ["$31", " 285", ""]
    question = "What is 12 plus 345?"
    actions = [NOOP] * 8 + [TLU, TLU] + [NOOP] * 6 + [NLP, TLU, TLU] + [NOOP, NOOP]
    grid = laid_out(question, actions)
    assert ["".join(question[t] for t in row if t != EMPTY) for row in grid.token] == ["543", "21", ""]
    reading = seen(question, actions)
    assert reading.numbers == (12, 345) and reading.rest == "What is # plus #?" and reading.crispness == 1.0
    assert seen("582 13", given("582 13")).numbers == (582, 13)


def readings(split: str, n: int, sure: float = 1.0, task: str = "word-problem"):
    examples = open_task(task).examples(split, n)
    return [seen(text, sure=sure) for text in examples.inputs], examples.targets


def test_rules_learnt_on_short_problems_answer_all_long_ones():
    rules = learn(*readings("train", 1200))
    assert rules["What is # less than #?"].coefficients == (-1, 1, 0)
    assert rules["#+#"].coefficients == (1, 1, 0) and not rules["#+#"].magnitude
    assert rules["What is the difference between # and #?"].magnitude
    long, targets = readings("ood", 400)
    outcomes = [answer(reading, rules) for reading in long]
    assert all(outcome.answer == target for outcome, target in zip(outcomes, targets, strict=True))
    assert min(outcome.score for outcome in outcomes) > 0.9


def test_a_recurrence_is_a_rule_too():
    """Three rows hold the last three terms whatever the number of terms; those that fell off are of no account."""
    rules = learn(*readings("train", 300, task="number-sequence"))
    assert set(rules) == {"_ # # #"} and rules["_ # # #"].coefficients == (1, -1, 2)
    long, targets = readings("ood", 100, task="number-sequence")
    assert [answer(reading, rules).answer for reading in long] == targets


def test_answers_that_follow_no_rule_give_none():
    shuffled, targets = readings("train", 600)
    assert learn(shuffled, targets[1:] + targets[:1]) == {}


def test_a_rule_has_to_explain_most_questions_and_the_simplest_wins():
    asked = [((a, b), a + b) for a, b in itertools.product(range(3, 9), repeat=2)]
    found = rule(asked)
    assert found == Rule((1, 1, 0), False, 36, 36)
    wrong = [(numbers, target + (i % 3 == 0)) for i, (numbers, target) in enumerate(asked)]
    assert rule(wrong) is None
    few = [(numbers, target + (i == 5)) for i, (numbers, target) in enumerate(asked)]
    found = rule(few)
    assert found is not None and (found.right, found.of) == (35, 36) and found.reliability == 36 / 38


def test_products_are_rules_too():
    asked = [((a, b), a * b) for a, b in itertools.product(range(3, 9), repeat=2)]
    found = rule(asked)
    assert found is not None and found.coefficients == (0, 0, 1) and found((11, 12)) == 132
    assert rule([((a, b), a**b) for (a, b), _ in asked]) is None


def test_it_abstains_when_it_should():
    rules = learn(*readings("train", 600))
    assert answer(seen("What is 7 times 8?"), rules).reason == "no rule is known for 'What is # times #?'"
    assert answer(seen("12 + " + "9" * 26), rules).reason == "a number reaches beyond the last slot of its row"
    assert answer(seen("12 + " + "9" * 25), rules).answer == str(12 + int("9" * 25))
    assert answer(seen("12 + 3", [NOOP] * 7), rules).reason == "there is no number on the grid"
    blurred, crisp = (answer(seen("12 + 3", sure=sure), rules) for sure in (0.5, 0.999))
    assert crisp.answer == blurred.answer == "15" and crisp.score > 0.9 and blurred.score < 0.5


def test_only_actions_that_matter_make_a_layout_crisp():
    """A blurred end, or word, changes no number; a digit does, and so does one left out beside a number."""
    text = "Add 12 and 345."
    for token, matters in ((0, False), (3, False), (4, True), (5, True), (len(text), False), (11, True), (14, False)):
        p = probable(aligned(text))
        p[token] = 0.55 * p[token] + 0.15
        assert (read(text, p, 3, 25).crispness < 1) == matters, token
    actions = aligned(text)
    actions[11], actions[12] = NOOP, NLP
    p = probable(actions)
    p[11] = 0.55 * p[11] + 0.15
    reading = read(text, p, 3, 25)
    assert reading.numbers == (12, 45) and reading.rest == "Add # and _#." and reading.crispness < 1


def test_lists_without_numbers_take_no_row_and_what_fell_off_is_not_read():
    actions = [NLP, TLU, TLU, NOOP, NLP, TLU, NOOP, NLP, TLU, TLU, NOOP, NLP, TLU, TLU, TLU, NLP]
    assert seen("Add 12 and 345.", actions).numbers == (12, 345)
    text = "9 " + "x" * 25 + "12"
    assert seen(text, [NLP] + [TLU] * (len(text) - 1) + [NOOP]).numbers == (12,)


def test_a_sign_left_out_of_the_layout_is_part_of_the_question():
    """A layout that drops the second number's sign is not wrong if it always does so: the rest tells."""
    text = "What is 12 plus -5?"
    actions = aligned(text)
    actions[16], actions[17] = NOOP, NLP
    reading = seen(text, actions)
    assert reading.numbers == (12, 5) and reading.rest == "What is # plus -#?"


# decoders


def test_answers_round_trip():
    vocabulary = Vocabulary(tuple("0123456789-"))
    texts = [str(x) for x in np.random.default_rng(0).integers(-(10**12), 10**12, 500)] + ["0", "-1"]
    target, _ = vocabulary.encode(texts)
    slots = to_slots(target, 25)
    assert answers(slots, vocabulary) == texts
    assert (slots[:, 0] == END).all() and [vocabulary.symbols[i - 2] for i in slots[:, 1]] == [text[-1] for text in texts]
    assert np.array_equal(from_slots(slots)[:, : target.shape[1]], target)


def test_what_does_not_fit_is_wrong_and_a_hole_too():
    vocabulary = Vocabulary(tuple("0123456789"))
    target, _ = vocabulary.encode(["123456"])
    assert answers(to_slots(target, 5), vocabulary) == ["3456"]
    slots = to_slots(target, 10)
    slots[0, 3] = PAD
    assert answers(slots, vocabulary) != ["123456"]


def test_log_softmax_of_large_logits():
    logits = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(-1), 1)
    assert log_softmax(logits)[1, 0] == pytest.approx(-np.log(3))


# confidence


def test_scores_become_probabilities():
    rng = np.random.default_rng(0)
    score = rng.random(4000)
    right = rng.random(4000) < score**2
    found = calibrate(score, right, 0.2)
    probability = np.array([found.probability(s) for s in score])
    assert calibration_error(probability, right) < 0.03 < calibration_error(score, right)
    answered = score >= found.threshold
    assert answered.any() and (~right[answered]).mean() <= 0.2


def test_the_risk_holds_on_other_questions():
    """Of twenty sets of fresh questions, few may break the bound that each was promised with 95 %."""
    broken = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        score = rng.random((2, 3000))
        right = rng.random((2, 3000)) < 1 - (1 - score) ** 2 / 2
        least = threshold(score[0], right[0], 0.05)
        broken += (~right[1][score[1] >= least]).mean() > 0.05
    assert broken <= 3


def test_who_is_never_wrong_is_not_certain_and_who_is_never_right_says_nothing():
    perfect = calibrate(np.full(100, 0.999), np.ones(100, bool), 0.05)
    assert 0.98 < perfect.probability(0.999) < 0.995 and perfect.threshold == 0.999
    assert calibrate(np.full(100, 0.999), np.ones(100, bool), 0.001).threshold == NEVER, "100 questions cannot show that"
    assert calibrate(np.full(100, 0.999), np.zeros(100, bool), 0.05).threshold == NEVER
    assert calibrate(np.zeros(0), np.zeros(0, bool), 0.05).threshold == NEVER
    assert wilson(np.array([0]), np.array([10]))[0] > 0.2


def test_equal_scores_are_answered_together():
    """The right ones among equals happen to come first; answering these alone is not for choice."""
    score, right = np.full(300, 0.9), np.arange(300) < 200
    assert threshold(score, right, 0.05) == NEVER
    assert threshold(np.append(np.full(200, 0.95), score), np.append(np.ones(200, bool), right), 0.05) == 0.95


def test_a_score_that_misleads_is_ignored():
    rng = np.random.default_rng(0)
    score = rng.random(1000)
    intercept, slope = platt(score, rng.random(1000) > score)
    assert slope == 0.0 and intercept == pytest.approx(0.0, abs=0.3)


def test_what_is_read_of_labels_and_of_reading_order():
    assert read_answers(np.array([-0.5]), np.array([3]), False)[0].tolist() == [3]
    symbols, log_probability = read_answers(np.array([[-0.1, -0.2, -5.0]]), np.array([[4, END, 7]]), False)
    assert symbols.tolist() == [[4, END, PAD]] and log_probability == pytest.approx([-0.3])
    symbols, log_probability = read_answers(np.array([[-0.1, -0.2, -0.5]]), np.array([[END, 4, PAD]]), True)
    assert symbols.tolist() == [[4, END, PAD]] and log_probability == pytest.approx([-0.8])


def test_numbers_left_off_the_grid():
    assert shortened("12 -3 4 + # #") == "_ + # #" and shortened("8 - #") == "_ - #"


@pytest.mark.parametrize("module", [smidgen.symbolic.exact, smidgen.symbolic.confidence, smidgen.symbolic.layout])
def test_docstrings_hold(module):
    tests = [t for t in doctest.DocTestFinder().find(module) if t.examples]
    assert tests and all(doctest.DocTestRunner().run(t).failed == 0 for t in tests)
