"""Pre-trained models with levels on disk: one base, many lives, and nothing of the base in them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nestling.cli import main
from nestling.learner import (
    Learner,
    load_levels,
    load_stacked,
    newest,
    open_life,
    read_generation,
    reader_of,
    save_levels,
)
from nestling.learner.stacked import StackTokens, read_pretrained, save_stacked, stack_hash
from nestling.levels import Reader, StackConfig, level, masked_tokens, seen_classes, spectrum, stack
from nestling.memory.state import flatten
from pretrained import DECODERS, transformers

TEXT = "the quick brown fox jumps over the lazy dog, again and again. " * 5


def pretrained(folder: Path, name: str = "Llama", kind: str = "ForCausalLM", **more) -> Path:
    torch.manual_seed(3)
    shape = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64} | more
    config = getattr(transformers, f"{name}Config")(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    getattr(transformers, f"{name}{kind}")(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--periods", "8", "24", "--step-size", "0.5"],
        ["--how", "neurons", "--levels", "spectrum(4, 16, step_size=0.5)"],
        ["--how", "low_rank", "--periods", "8", "--rank", "2", "--context", "32", "--overlap", "8"],
    ],
    ids=lambda a: " ".join(a),
)
def test_from_a_folder_to_a_life(tmp_path: Path, text: Path, arguments: list[str], capsys) -> None:
    base, life = pretrained(tmp_path / "base"), tmp_path / "life"
    untouched = {path.name: path.read_bytes() for path in base.iterdir()}
    assert main(["stack", str(base), "--out", str(life), *arguments]) == 0
    assert main(["learn", str(life), str(text)]) == 0
    assert main(["learn", str(life), str(text)]) == 0  # the life goes on
    assert main(["info", str(life)]) == 0
    told = capsys.readouterr().out
    assert "in 2 MLPs" in told
    assert "predicted before learned" in told
    assert f"{2 * len(TEXT):,} tokens read" in told
    assert {path.name: path.read_bytes() for path in base.iterdir()} == untouched

    saved = load_stacked(life)
    state = open_life(life, saved, Reader(saved.model))
    live = read_twice(saved)
    ids = torch.arange(40).view(1, 40)
    assert torch.equal(saved.model(ids, weights=state.levels.weights)[0], saved.model(ids, weights=live)[0])
    folder = newest(life / "life")
    kept = read_generation(folder)
    assert kept.data["life"]["base"] == f"LlamaForCausalLM of {base}"
    assert set(kept.tensors["levels"]) == set(flatten(state.levels)), "a life is its levels, and nothing of the base"

    assert main(["generate", str(life), "--prompt", "the quick", "--tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


def read_twice(saved):
    reader = Reader(saved.model)
    state = reader.begin()
    for _ in range(2):
        state, _ = reader.read(state, saved.encode(TEXT.encode()))
        state, _ = reader.end_document(state)
    return state.levels.weights


def test_the_first_lines_of_the_page(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "pretrained.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    assert "stack(base" in lines
    names = {"tokens": torch.arange(140), "prompt": torch.arange(5)[None]}
    exec(lines.replace("path/to/a/model", str(pretrained(tmp_path / "base"))), names)
    assert names["out"].nll.shape == (140,)
    assert not torch.equal(names["state"].levels.weights[0][0], names["model"].level_weights()[0][0])


@pytest.mark.parametrize("how", ["layers", "neurons", "low_rank"])
@pytest.mark.parametrize("layout", DECODERS)
def test_levels_come_back_bit_for_bit(tmp_path: Path, layout: str, how: str) -> None:
    model = stack(DECODERS[layout](), [4, 12], how)
    tokens = torch.arange(30)
    reader = Reader(model)
    state, _ = reader.read(reader.begin(), tokens)
    save_levels(tmp_path / "life.safetensors", model, state.levels.weights, "a model")
    again = stack(DECODERS[layout](), [4, 12], how)
    weights = load_levels(tmp_path / "life.safetensors", again)
    expected, _ = model(tokens[None], weights=state.levels.weights)
    assert torch.equal(again(tokens[None], weights=weights)[0], expected)
    assert not torch.equal(again(tokens[None])[0], expected)
    with pytest.raises(ValueError, match=r"levels of a model .*, but this model is"):
        load_levels(tmp_path / "life.safetensors", stack(DECODERS[layout](), [4, 16], how))


def test_levels_of_another_base_are_refused(tmp_path: Path) -> None:
    model = stack(DECODERS["llama"](), [4])
    save_levels(tmp_path / "life", model, model.level_weights(), "a model")
    other = DECODERS["llama"]()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    with pytest.raises(ValueError, match="but this model is"):
        load_levels(tmp_path / "life", stack(other, [4]))
    (tmp_path / "life").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        load_levels(tmp_path / "life", model)


def test_one_base_serves_two_lives(tmp_path: Path, text: Path) -> None:
    base = pretrained(tmp_path / "base", "GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=64)
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    for name, read in (("one", text), ("two", other)):
        assert main(["stack", str(base), "--out", str(tmp_path / name), "--periods", "8"]) == 0
        assert main(["learn", str(tmp_path / name), str(read)]) == 0
    found = []
    for name in ("one", "two"):
        saved = load_stacked(tmp_path / name)
        found.append(open_life(tmp_path / name, saved, Reader(saved.model)).levels.weights)
    assert not torch.equal(found[0][0][0], found[1][0][0])


def test_a_tokenizer_of_its_own(tmp_path: Path, text: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    base = pretrained(tmp_path / "base", vocab_size=tokenizer.get_vocab_size())
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(base)
    life = tmp_path / "life"
    assert main(["stack", str(base), "--out", str(life), "--periods", "8"]) == 0
    assert main(["learn", str(life), str(text)]) == 0
    saved = load_stacked(life)
    tokens = saved.encode(TEXT.encode())
    assert tokens.tolist() == tokenizer.encode(TEXT).ids
    assert tokens.numel() < len(TEXT) / 3
    assert saved.decode(tokens) == TEXT.encode()
    assert int(newest(life / "life").name) == tokens.numel()


def test_encoders_on_disk(tmp_path: Path, text: Path, capsys) -> None:
    base = pretrained(tmp_path / "base", "Bert", "ForMaskedLM")
    for name, loss, code in (("none", None, 2), ("classes", "seen_classes()", 2), ("masked", "masked_tokens(3)", 0)):
        told = ["--loss", loss] if loss else []
        assert main(["stack", str(base), "--out", str(tmp_path / name), "--periods", "8", "32", *told]) == 0
        assert main(["learn", str(tmp_path / name), str(text)]) == code
    printed = capsys.readouterr()
    said = printed.err
    assert "bits/byte" in printed.out
    assert "not finite" not in printed.out  # tokens that were not masked have no prediction
    assert "BertForMaskedLM is an encoder, and nothing says what it learns from" in said
    assert "read with ExampleReader" in said
    saved = load_stacked(tmp_path / "masked")
    state = open_life(tmp_path / "masked", saved, reader_of(saved.model, learning=True))
    assert int(state.position) == len(TEXT)
    assert not torch.equal(state.levels.weights[0][0], saved.model.level_weights()[0][0])
    assert main(["generate", str(tmp_path / "masked"), "--prompt", "x"]) == 2
    assert "does not write" in capsys.readouterr().err


def test_an_encoder_that_breaks_says_so_and_learns_nothing_of_it(tmp_path: Path, text: Path, capsys) -> None:
    base = pretrained(tmp_path / "base", "Bert", "ForMaskedLM")
    told = ["--loss", "masked_tokens(3)", "--periods", "8", "--step-size", "1e30"]
    assert main(["stack", str(base), "--out", str(tmp_path / "life"), *told]) == 0
    assert main(["learn", str(tmp_path / "life"), str(text)]) == 0
    said = capsys.readouterr().out
    assert "segments, which were refused" in said
    assert "The levels' steps are too large" in said
    saved = load_stacked(tmp_path / "life")
    state = open_life(tmp_path / "life", saved, reader_of(saved.model, learning=True))
    assert all(bool(tensor.isfinite().all()) for tensor in flatten(state.levels).values())


def test_what_does_not_fit_is_named(tmp_path: Path, text: Path, capsys) -> None:
    base, life = pretrained(tmp_path / "base"), tmp_path / "life"
    with pytest.raises(ValueError, match=r"no config\.json"):
        save_stacked(life, tmp_path, StackConfig(levels=(level(4),)))
    save_stacked(life, base, StackConfig(levels=(level(4),)))
    with pytest.raises(ValueError, match="holds a model already"):
        save_stacked(life, base, StackConfig(levels=(level(4),)))
    assert stack_hash(load_stacked(life).model) == load_stacked(life).hash
    about = json.loads((life / "stack.json").read_text())
    (life / "stack.json").write_text(json.dumps(about | {"stack": about["stack"] | {"rank": 0}}))
    with pytest.raises(ValueError, match=r"stack\.json: stack: rank must be >= 1"):
        load_stacked(life)
    (life / "stack.json").write_text(json.dumps(about))
    shutil.rmtree(base)
    torch.manual_seed(0)
    pretrained(base, intermediate_size=32)
    with pytest.raises(ValueError, match="was made for"):
        load_stacked(life)
    shutil.rmtree(base)
    assert main(["learn", str(life), str(text)]) == 2
    assert f"{base}: no folder of a model" in capsys.readouterr().err
    words = pretrained(tmp_path / "words", vocab_size=99)
    save_stacked(tmp_path / "other", words, StackConfig(levels=(level(4),)))
    with pytest.raises(ValueError, match="no tokenizer"):
        load_stacked(tmp_path / "other")


def test_stacking_comes_back_from_its_file(tmp_path: Path) -> None:
    base = pretrained(tmp_path / "base", "Bert", "ForMaskedLM")
    for index, config in enumerate(
        (
            StackConfig(levels=(spectrum(4, 16),), how="neurons", loss=masked_tokens(3, share=0.3)),
            StackConfig(levels=(level(4), level(float("inf"))), how="low_rank", rank=3, seed=4, loss=seen_classes()),
            StackConfig(levels=(level(4),), context=16, overlap=4),
        )
    ):
        save_stacked(tmp_path / str(index), base, config)
        assert load_stacked(tmp_path / str(index)).model.config == config


def test_a_life_of_a_pretrained_model(tmp_path: Path) -> None:
    """Journaled, replayed, forgotten and forked like any life; the pre-trained model stays where it is."""
    base = pretrained(tmp_path / "base")
    text, more = (torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    model = stack(read_pretrained(base), [8, 24], step_size=0.5)
    with Learner.create(tmp_path / "life", model) as life:
        with pytest.raises(ValueError, match="in no folder"):
            Learner.create(tmp_path / "other", stack(DECODERS["llama"](), [8]))
        life.learn(text, "one")
        once = flatten(life.state.reading.levels)
        life.learn(more, "two")
        assert not all(torch.equal(x, once[name]) for name, x in flatten(life.state.reading.levels).items())
        life.forget("two")
        after = flatten(life.state.reading.levels)
        assert all(torch.equal(after[name], tensor) for name, tensor in once.items())
    with Learner.open(tmp_path / "life") as again:
        assert all(torch.equal(x, once[name]) for name, x in flatten(again.state.reading.levels).items())
        assert len(list(again.generate(text[:5], 4, seed=1))) == 4
    assert not list((tmp_path / "life" / "model").glob("*.safetensors"))


def test_bytes_that_are_no_text_are_not_replaced() -> None:
    with pytest.raises(ValueError, match="reads UTF-8, and byte 3 of the text is not"):
        StackTokens(object(), 300).encode(b"abc\xff")
    assert StackTokens(None, 256).encode(b"abc\xff").tolist() == [*b"abc\xff"]
