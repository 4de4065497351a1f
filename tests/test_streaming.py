"""Blocks that come from disk one at a time against the stock model in memory, and what is written from them."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common import checkpoint, modeling_pruned, streaming
from common.blocks import blocks_of, layers_of
from common.pruning import shrink_
from common.runs import UserError, quiet_transformers
from common.streaming import Activations, StreamedLM
from tests import test_families

CPU = torch.device("cpu")
GQA, OPT = test_families.GQA, test_families.OPT
MIXED = {"use_sliding_window": True, "sliding_window": 4,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]}  # fmt: skip
CASES = {name: (prefix, settings) for name, (prefix, head, settings) in test_families.FAMILY_CASES.items()
         if head == "CausalLM"}  # fmt: skip
CASES |= {
    "llama-tied": ("Llama", GQA | {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", GQA | {"attention_bias": True, "mlp_bias": True}),
    "opt-untied": ("OPT", OPT | {"tie_word_embeddings": False}),
    "qwen2-mixed": ("Qwen2", GQA | MIXED),
    "qwen3-tied": ("Qwen3", GQA | {"tie_word_embeddings": True}),
}
IDS = torch.randint(3, 50, (5, 9), generator=torch.Generator().manual_seed(1))  # batches of two and a last one of one


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads, _ = torch.get_num_threads(), torch.set_num_threads(1)
    quiet_transformers()
    yield
    torch.set_num_threads(threads)


def random_lm(case, dtype=torch.float32, **changes):
    """A causal LM none of whose parameters is trivial."""
    prefix, settings = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(4)
    return model.to(dtype)


def save_random(folder, case, dtype=torch.float32, **how):
    random_lm(case, dtype).save_pretrained(folder, **how)
    return folder


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(folder, ids=IDS, batch=2):
    model = stock(folder)
    return torch.cat([model(part).logits for part in ids.split(batch)])


def streamed_logits(lm, ids=IDS, batch=2, directory=None):
    hidden = lm.embed(ids, batch, directory)
    for i in range(len(lm)):
        with lm.loaded(i):
            lm.advance(i, hidden)
    with torch.no_grad():
        return torch.cat([lm.logits(part, hidden[b]) for b, part in enumerate(ids.split(batch))])


def rename(folder, change):
    """Store the tensors of a directory under other names; without one, not at all."""
    path = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items() if change(name)}
    save_file(tensors, path, metadata={"format": "pt"})


def all_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


# ---------------------------------------------------------------------------------------------------------- block by block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_block_by_block_is_the_stock_model(case, dtype, tmp_path):
    lm = StreamedLM(save_random(tmp_path, case, dtype), CPU)
    wanted = logits_of(tmp_path)
    assert wanted.std() > 0.02
    assert torch.equal(streamed_logits(lm), wanted)
    other = IDS.flip(1)
    assert torch.equal(streamed_logits(lm, other), logits_of(tmp_path, other))  # a second pass, with the head there
    assert {p.dtype for p in lm.model.parameters() if not p.is_meta} == {torch.float32}  # however it is stored
    assert set(lm.stored(0).values()) == {dtype}


@pytest.mark.parametrize("case", CASES)
def test_the_arguments_of_each_layer_are_its_own(case, tmp_path):
    lm = StreamedLM(save_random(tmp_path, case), CPU)
    lm.embed(IDS, 2)
    model, seen = stock(tmp_path), {}

    def note(layer, args, kwargs):
        seen[order[layer]] = args[1:], kwargs

    order = {layer: i for i, layer in enumerate(layers_of(model))}
    for layer in order:
        layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for part in IDS.split(2):
            model(part, use_cache=False)
            for i in range(len(lm)):
                args, kwargs = lm.arguments[i][tuple(part.shape)]
                torch.testing.assert_close((args, kwargs), seen[i], rtol=0, atol=0)
    if case == "qwen2-mixed":
        masks = [kwargs["attention_mask"] for _, kwargs in seen.values()]
        assert [mask is not None and not mask[0, 0, -1, 0] for mask in masks] == [False, True, False]


def test_reduced_precision_is_that_of_the_forwards(tmp_path):
    wanted = streamed_logits(StreamedLM(save_random(tmp_path, "llama"), CPU))
    found = streamed_logits(StreamedLM(tmp_path, CPU, "bf16-mixed"))
    assert found.dtype == torch.float32
    assert 1e-4 < (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_shards_are_one_model(tmp_path):
    save_random(tmp_path / "whole", "qwen2")
    save_random(tmp_path / "sharded", "qwen2", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(streamed_logits(StreamedLM(tmp_path / "sharded", CPU)), logits_of(tmp_path / "whole"))


@pytest.mark.parametrize("case", ["opt-350m", "opt", "llama", "llama-tied"])
def test_names_without_the_base_models_prefix(case, tmp_path):
    wanted = logits_of(save_random(tmp_path, case))
    rename(tmp_path, lambda name: name.removeprefix("model."))
    assert "model." not in "".join(all_tensors(tmp_path))
    assert torch.equal(streamed_logits(StreamedLM(tmp_path, CPU)), wanted)


def is_clean(lm):
    on_meta = all(parameter.is_meta for layer in lm.layers for parameter in layer.parameters())
    return on_meta and not any("forward" in vars(layer) for layer in lm.layers)


def test_nothing_of_a_block_stays(tmp_path):
    lm = StreamedLM(save_random(tmp_path, "opt"), CPU)
    assert is_clean(lm)
    lm.embed(IDS, 2)
    with lm.loaded(1) as block:
        assert block is lm.blocks[1] and not block.ffn.out.weight.is_meta and not block.ffn.out.weight.requires_grad
        assert all(parameter.is_meta for i in (0, 2) for parameter in lm.layers[i].parameters())
        block.ffn.out.weight.data = block.ffn.out.weight.data * 2
        assert all(tensor.dtype == torch.float32 for tensor in lm.tensors(1).values())
    assert is_clean(lm)
    with pytest.raises(ZeroDivisionError), lm.loaded(1):
        raise ZeroDivisionError
    assert is_clean(lm)
    with lm.loaded(1) as block:  # as it is stored, whatever was done to it before
        wanted = stock(tmp_path).model.decoder.layers[1].fc2.weight
        assert torch.equal(block.ffn.out.weight, wanted)
    wrong = lm.read([*lm.tensors(1)]) | {"model.decoder.layers.1.fc2.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError), lm.loaded(1, wrong):
        pass
    assert is_clean(lm)


def test_a_forward_that_fails_leaves_no_stub(tmp_path, monkeypatch):
    lm = StreamedLM(save_random(tmp_path, "llama"), CPU)
    with pytest.raises(IndexError):
        lm.embed(torch.full((2, 5), 10**6), 2)
    assert is_clean(lm)
    monkeypatch.setattr(Activations, "append", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.embed(IDS, 2)
    assert is_clean(lm)
    monkeypatch.undo()
    assert torch.equal(streamed_logits(lm), logits_of(tmp_path))


def test_blocks_can_be_given(tmp_path):
    """What was pruned runs in the place of what is stored."""
    lm = StreamedLM(save_random(tmp_path, "llama"), CPU)
    hidden = lm.embed(IDS, 8)
    with lm.loaded(0):
        given = {name: torch.zeros_like(tensor) for name, tensor in lm.tensors(0).items()}
    before = hidden[0].clone()
    with lm.loaded(0, given):
        lm.advance(0, hidden)
    assert torch.equal(hidden[0], before)  # a block of zeros adds nothing to the residual stream


# ------------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("case", ["llama", "opt-350m"])
def test_activations_on_disk_are_those_in_memory(case, tmp_path):
    lm = StreamedLM(save_random(tmp_path / "model", case), CPU)
    assert torch.equal(streamed_logits(lm, directory=tmp_path / "states"), streamed_logits(lm))
    assert [path.stat().st_size for path in sorted((tmp_path / "states").iterdir())] == [4 * 32 * 9 * n for n in (2, 2, 1)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_activations_are_kept_as_they_are_given(on_disk, tmp_path):
    kept = Activations(tmp_path / "states" if on_disk else None)
    first, second = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    kept.append(first.bfloat16())
    kept.append(second)
    assert len(kept) == 2 and kept[0].dtype == torch.float32
    assert torch.equal(kept[0], first.bfloat16().float()) and torch.equal(kept[1], second)
    kept[1] = second * 2
    second.zero_()
    assert kept[1].abs().sum() > 0  # a copy
    kept.drop()
    assert len(kept) == 0 and not (tmp_path / "states").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dropped_activations_are_not_mapped_any_more(tmp_path):
    """Windows does not remove a file that is mapped: the mapping has to go first."""
    lm = StreamedLM(save_random(tmp_path / "model", "llama"), CPU)
    hidden = lm.embed(IDS, 2, tmp_path / "states")
    with lm.loaded(0):
        lm.advance(0, hidden)
    mapped = lambda: [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "states") in line]  # noqa: E731
    assert len(mapped()) == 3
    hidden.drop()
    assert not mapped()


# ----------------------------------------------------------------------------------------------------------------- refused


def drop_tensor(folder):
    rename(folder, lambda name: None if name == "model.layers.2.mlp.up_proj.weight" else name)


def drop_head(folder):
    rename(folder, lambda name: None if name == "lm_head.weight" else name)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shard(folder):
    shutil.rmtree(folder)
    save_random(folder, "llama", max_shard_size="20KB")
    return sorted(folder.glob("*.safetensors"))


BROKEN = {
    "a missing tensor": (drop_tensor, "no tensor model.layers.2.mlp.up_proj.weight"),
    "a missing head": (drop_head, "no tensor lm_head.weight"),
    "a damaged file": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: not readable"),
    "a damaged shard": (lambda folder: cut(shard(folder)[2]), "model-00003.*not readable"),
    "a missing shard": (lambda folder: shard(folder)[1].unlink(), "model-00002.*not readable"),
    "no safetensors": (pickle_weights, "no model.safetensors"),
    "another shape": (lambda folder: edit_config(folder, intermediate_size=40), r"\[48, 32\], expected \[40, 32\]"),
    "an encoder": (lambda folder: edit_config(folder, model_type="bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "a base model": (lambda folder: edit_config(folder, architectures=["LlamaModel"]), "LlamaModel; expected a causal"),
    "an unknown family": (lambda folder: edit_config(folder, model_type="gpt2"), "'gpt2' is not supported"),
    "mixtral": (lambda folder: edit_config(folder, model_type="mixtral"), "'mixtral' is not supported"),
    "qwen2_moe": (lambda folder: edit_config(folder, model_type="qwen2_moe"), "'qwen2_moe' is not supported"),
    "no known model": (lambda folder: edit_config(folder, model_type="nothing"), "no config.json of a known model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_streamed_is_refused_before_a_tensor_is_read(what, tmp_path, monkeypatch):
    change, message = BROKEN[what]
    change(save_random(tmp_path / "model", "llama"))
    monkeypatch.setattr(StreamedLM, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=message):
        StreamedLM(tmp_path / "model", CPU)


# ----------------------------------------------------------------------------------------------------------------- written


def write_parts(lm, folder, change=lambda name, tensor: tensor * 0.5):
    """A part a block, in which its projections are changed."""
    parts, projections = [], {f"{name}.weight" for name in lm.names.values()}
    for i in range(len(lm)):
        dtypes = lm.stored(i)
        with lm.loaded(i):
            tensors = {n: (change(n, t) if n in projections else t).to(dtypes[n]) for n, t in lm.tensors(i).items()}
        parts.append(folder / "blocks" / f"block-{i}.safetensors")
        streaming.save_tensors(parts[-1], tensors)
    return parts, projections


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", ["llama", "opt", "opt-350m", "qwen2"])
def test_parts_win_and_the_rest_is_untouched(case, sharded, tmp_path, monkeypatch):
    source, target = save_random(tmp_path / "source", case, torch.bfloat16), tmp_path / "deep" / "target"
    if case == "opt-350m":
        rename(source, lambda name: name.removeprefix("model."))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not of the model")
    lm = StreamedLM(source, CPU)
    parts, projections = write_parts(lm, tmp_path)
    if sharded:
        monkeypatch.setattr(streaming, "SHARD_BYTES", 1000)
    streaming.assemble(source, parts, target, [{"first": 1}, {"path": Path("a")}])
    before, after = all_tensors(source), all_tensors(target)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {streaming.stored_name(name, before) for name in projections} and len(changed) > 15
    assert all(torch.equal(after[name], before[name] * 0.5) and after[name].dtype == torch.bfloat16 for name in changed)
    assert torch.equal(streamed_logits(StreamedLM(target, CPU)), logits_of(target))
    assert (logits_of(target) - logits_of(source)).abs().max() > 0.01
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert shards == ([f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)] if sharded else ["model.safetensors"])
    if sharded:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in after.values())
        for name, file in index["weight_map"].items():
            with safe_open(target / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118
    assert json.loads((target / "compression.json").read_text()) == {"stages": [{"first": 1}, {"path": "a"}]}
    copied = {path.name for path in source.iterdir()} - {"notes.txt", "model.safetensors"}
    assert {path.name for path in target.iterdir()} - {*shards, "compression.json", "model.safetensors.index.json"} == copied
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in copied)
    assert all(part.exists() for part in parts) and [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_sharded_source_becomes_one_file(tmp_path):
    save_random(tmp_path / "whole", "llama")
    source = save_random(tmp_path / "source", "llama", max_shard_size="20KB")
    parts, _ = write_parts(StreamedLM(source, CPU), tmp_path, lambda name, tensor: tensor)
    streaming.assemble(source, parts, tmp_path / "target", [])
    assert (tmp_path / "target" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (tmp_path / "target" / "model.safetensors.index.json").exists()


def test_zeros_are_counted_in_what_is_named(tmp_path):
    source = save_random(tmp_path / "source", "opt-350m", torch.bfloat16)
    rename(source, lambda name: name.removeprefix("model."))
    lm = StreamedLM(source, CPU)

    def zero(name, tensor):
        return torch.where(torch.arange(tensor.numel()).view(tensor.shape) % 4 == 0, 0.0, tensor) if "fc1" in name else tensor

    parts, projections = write_parts(lm, tmp_path, zero)
    streaming.assemble(source, parts, tmp_path / "target", [])
    ffn = sorted(name for name in projections if "fc1" in name)
    assert streaming.measured_sparsity(tmp_path / "target", ffn) == 0.25
    share = 3 * 32 * 48 / sum(lm.model.get_parameter(name).numel() for name in projections)
    assert streaming.measured_sparsity(tmp_path / "target", sorted(projections)) == pytest.approx(0.25 * share)


def test_a_model_of_uneven_layers_goes_on_with_its_code(tmp_path):
    model = random_lm("llama")
    shrink_(model, test_families.uneven_keep(blocks_of(model)))
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoint.save_model(source, model, test_families.Tokenizer(), {"script": "before"})
    lm = StreamedLM(source, CPU)
    with torch.no_grad():
        assert torch.equal(streamed_logits(lm, batch=5), model(IDS).logits)
    parts, _ = write_parts(lm, tmp_path)
    streaming.assemble(source, parts, target, [*checkpoint.compression_stages(source), {"script": "after"}])
    assert (target / "modeling_pruned.py").read_text() == Path(modeling_pruned.__file__).read_text()
    assert [stage["script"] for stage in checkpoint.compression_stages(target)] == ["before", "after"]
    with torch.no_grad():
        for block in blocks_of(model):
            for linear in block.projections:
                linear.weight.mul_(0.5)
        found = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True).eval()(IDS).logits
        assert torch.equal(found, model(IDS).logits)
    assert torch.equal(streamed_logits(StreamedLM(target, CPU), batch=5), found)


def die_while_assembling(moment, source, parts, target):
    replace, calls = os.replace, []

    def dying(old, new):
        name = Path(new).name
        calls.append(name)
        if moment == ("weights", name):
            Path(old).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
        if moment == ("renames", name):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying
    streaming.assemble(source, parts, target, [])


@pytest.mark.parametrize("moment", [("weights", "model.safetensors"), ("renames", "compression.json"),
                                    ("renames", ".target.old"), ("renames", "target")], ids=str)  # fmt: skip
def test_a_kill_leaves_the_old_directory_or_the_new_one(moment, tmp_path):
    source, target = save_random(tmp_path / "source", "opt"), tmp_path / "target"
    parts, _ = write_parts(StreamedLM(source, CPU), tmp_path)
    target.mkdir()
    (target / "config.json").write_text("old")
    process = multiprocessing.get_context("fork").Process(target=die_while_assembling, args=(moment, source, parts, target))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if moment[1] == ".target.old":  # between the two renames: both are whole, beside the place
        assert (tmp_path / ".target.old" / "config.json").read_text() == "old" and not target.exists()
        wanted = logits_of(tmp_path / ".target.new")
        shutil.rmtree(tmp_path / ".target.new")
        with pytest.raises(UserError):  # the next try fails early: the old one is back
            streaming.assemble(source, [tmp_path / "nothing"], target, [])
        assert (target / "config.json").read_text() == "old"
        streaming.assemble(source, parts, target, [])
        assert torch.equal(logits_of(target), wanted)
    elif moment[1] == "target":
        assert (logits_of(target) - logits_of(source)).abs().max() > 0.01
    else:
        assert [path.name for path in target.iterdir()] == ["config.json"]
        assert (target / "config.json").read_text() == "old"
    streaming.assemble(source, parts, target, [])
    assert (logits_of(target) - logits_of(source)).abs().max() > 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "source", "target"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    source, target = save_random(tmp_path / "source", "opt"), tmp_path / "target"
    parts, _ = write_parts(StreamedLM(source, CPU), tmp_path)
    target.mkdir()
    (target / "config.json").write_text("old")
    monkeypatch.setattr(streaming, "save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        streaming.assemble(source, parts, target, [])
    assert (target / "config.json").read_text() == "old" and [path.name for path in target.iterdir()] == ["config.json"]
