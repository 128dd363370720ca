"""EasyEdit: edit weights, evaluate, get the exact original back or keep the edit, and know which of the two one holds

The edits are rank-one updates of a feed-forward output, as ROME makes them, on tiny random models of transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from paramstate import EditError, EditSession, edit
from paramstate.bits import same_bits
from small_models import assert_same_bits, state_by_name

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

EDITED = "transformer.h.1.mlp.c_proj.weight"
TOKENS = torch.arange(16).reshape(2, 8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gpt2(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=31
    )
    return transformers.LlamaForCausalLM(config).eval()


def edit_fact(model: nn.Module, fact: int, name: str = EDITED, scale: float = 1.0) -> torch.Tensor:
    """A rank-one update of one weight, in place; another fact is another update."""
    weight = model.get_parameter(name)
    draw = torch.Generator().manual_seed(fact)
    left, right = (torch.randn(size, generator=draw).to(weight.dtype) for size in weight.shape)
    update = scale * torch.outer(left, right)
    with torch.no_grad():
        weight += update
    return update


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """All values, buffers that are not saved included."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = bits(model)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def answer(model: nn.Module) -> list[int]:
    return model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 8:].tolist()


# ---- edit, evaluate, restore -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_is_evaluated_and_undone_bit_for_bit(dtype: torch.dtype) -> None:
    """After an edit in fp32, bf16 or fp16 every value and every logit is the original's again, bit for bit."""
    model = gpt2(dtype)
    before, outputs = bits(model), logits(model)
    with edit(model, EDITED) as session:
        edit_fact(model, 1)
        assert not torch.equal(logits(model), outputs)
        assert [change.name for change in session.changes()] == [EDITED]
    assert_holds(model, before)
    assert same_bits(logits(model), outputs)


def test_adding_the_update_and_taking_it_off_again_is_no_way_back() -> None:
    """Subtracting what was added leaves rounding behind: a copy is what makes the restore exact."""
    model = gpt2(torch.bfloat16)
    before = bits(model)
    with edit(model):
        update = edit_fact(model, 1)
        with torch.no_grad():
            model.get_parameter(EDITED).sub_(update)
        assert not same_bits(model.get_parameter(EDITED).detach(), before[EDITED])
    assert_holds(model, before)


def test_the_original_comes_back_after_an_exception() -> None:
    """An evaluation that fails in the middle of an edit leaves the original."""
    model = gpt2()
    before = bits(model)

    def evaluation() -> None:
        with edit(model, "transformer.h.1"):
            edit_fact(model, 1)
            model(torch.tensor([[31]]))  # no such token

    with pytest.raises(IndexError):
        evaluation()
    assert_holds(model, before)


def test_some_parameters_are_restored_and_the_others_keep_the_edit() -> None:
    """Of an edit of two layers one is taken back by name, and the other one is kept."""
    model = gpt2()
    before, other = bits(model), EDITED.replace("h.1", "h.0")
    with edit(model, "transformer.h.*.mlp") as session:
        edit_fact(model, 1)
        edit_fact(model, 2, other)
        kept = model.get_parameter(other).detach().clone()
        session.restore(EDITED)
        session.commit()
    assert_holds(model, {**before, other: kept})


def test_buffers_and_requires_grad_come_back() -> None:
    """Buffers, also of modules without parameters as rotary embeddings are, and requires_grad come back."""
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    before = bits(model)
    trained = {name: param.requires_grad for name, param in model.named_parameters()}
    rotary = [name for name, _ in model.named_buffers()]
    assert rotary, "this release has no buffers to test"
    with edit(model):
        for _, buffer in model.named_buffers():
            buffer.zero_()
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
    assert_holds(model, before)
    assert {name: param.requires_grad for name, param in model.named_parameters()} == trained


def test_a_tied_weight_that_was_edited_in_one_place_is_one_object_again() -> None:
    """Embedding and head that are tied are one object again, also where the edit replaced it in one of the two."""
    model = gpt2()
    before, tied = bits(model), model.lm_head.weight
    assert tied is model.transformer.wte.weight
    with edit(model, "lm_head.weight"):
        model.lm_head.weight = nn.Parameter(torch.zeros_like(tied))
    assert model.lm_head.weight is model.transformer.wte.weight is tied
    assert_holds(model, before)


# ---- which of the two does one hold? ---------------------------------------------------------------------------------


def test_one_knows_whether_one_holds_the_original_or_the_edit() -> None:
    """While a session is open it says whether the model holds the edit, and what the edit changed."""
    model = gpt2()
    with edit(model, "transformer.h.1") as session:
        assert (session.is_open, session.is_edited, session.changes()) == (True, False, [])
        edit_fact(model, 1)
        assert session.is_edited
        session.toggle()
        assert not session.is_edited
        session.toggle()
        assert session.is_edited
    assert not session.is_open
    (change,) = session.changes()
    assert (change.name, change.replaced, change.requires_grad) == (EDITED, False, False)
    assert change.max_change is not None
    assert change.max_change > 0.1


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "LoRA"])
def test_both_models_answer_side_by_side(wrapped: bool) -> None:
    """Original and edited model answer in turn from one model in memory, bare or with adapters around it."""
    model = gpt2()
    inner = copy.deepcopy(model)
    whole = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["c_attn"])) if wrapped else inner
    reference = copy.deepcopy(model)
    edit_fact(reference, 1, scale=3.0)
    expected = answer(model), answer(reference)
    assert expected[0] != expected[1]
    with edit(whole, EDITED) as session:
        edit_fact(inner, 1, scale=3.0)
        for _ in range(2):
            assert answer(whole) == expected[1]
            session.toggle()
            assert answer(whole) == expected[0]
            session.toggle()


def test_an_edit_that_is_kept_is_what_remains() -> None:
    """A committed edit stays when the session ends, and is the original of the next one."""
    model = gpt2()
    with edit(model, EDITED) as session:
        edit_fact(model, 1)
        edited = bits(model)
        session.commit()
        assert not session.is_edited
    assert_holds(model, edited)
    with edit(model, EDITED):
        edit_fact(model, 2)
    assert_holds(model, edited)


# ---- a stack of edits ------------------------------------------------------------------------------------------------


def test_nested_edits_are_a_stack() -> None:
    """Edits inside edits are undone one by one, each to what the one around it had made."""
    model = gpt2()
    states = [bits(model)]
    sessions: list[EditSession] = []
    for fact in range(3):
        sessions.append(edit(model, EDITED))
        edit_fact(model, fact)
        states.append(bits(model))
    with pytest.raises(EditError, match="inside this one"):
        sessions[0].close()
    for session in reversed(sessions):
        assert_holds(model, states.pop())
        session.close()
    assert_holds(model, states.pop())


def test_facts_are_edited_one_after_another_and_each_step_is_at_hand() -> None:
    """Sequential edits are marked, undone, redone, restored to the base and committed, each state bit for bit."""
    model = gpt2()
    states = [bits(model)]
    with edit(model, "transformer.h.*.mlp") as session:
        for fact in range(3):
            edit_fact(model, fact)
            session.mark(f"fact {fact}")
            states.append(bits(model))
        assert session.history == ["base", "fact 0", "fact 1", "fact 2"]
        for position in (2, 1, 0):
            session.undo()
            assert_holds(model, states[position])
        for position in (1, 2, 3):
            session.redo()
            assert_holds(model, states[position])
        session.restore()
        assert_holds(model, states[0])
        session.redo()
        session.commit()
        edit_fact(model, 9)
    assert_holds(model, states[1])


# ---- comparison, memory, device --------------------------------------------------------------------------------------


def test_the_comparison_with_the_base_names_what_the_edit_did() -> None:
    """session.diff() says of each parameter whether it equals the base, and by how much the edited one changed."""
    model = gpt2()
    with edit(model, "transformer.h.1") as session:
        update = edit_fact(model, 1)
        rows = {row.a: row for row in session.diff().rows}
    assert {name: row.kind for name, row in rows.items() if row.kind != "equal"} == {EDITED: "changed"}
    assert rows[EDITED].max_abs == pytest.approx(float(update.abs().max()), rel=1e-5)


def test_memory_is_that_of_the_touched_parameters() -> None:
    """A session copies what is selected, and a marked step only what changed since the last one."""
    model = gpt2()
    with edit(model, "transformer.h.1.mlp") as session:
        selected = [param for name, param in model.named_parameters() if name.startswith("transformer.h.1.mlp.")]
        copies = {copied.data_ptr(): copied.nbytes for copied in session.base().values()}
        assert sum(copies.values()) == sum(param.nbytes for param in selected)
        assert copies.keys().isdisjoint(param.data_ptr() for param in selected)
        edit_fact(model, 1)
        session.mark()
        held = {c.bits.data_ptr(): c.bits.nbytes for step in session._history for c in step.values.values()}
        assert sum(held.values()) == sum(copies.values()) + model.get_parameter(EDITED).nbytes


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("to", [None, "cpu"])
def test_copies_stay_on_the_device_or_go_to_the_host(device: str, to: str | None) -> None:
    """Copies are on each parameter's own device, or on the one that is asked for; the restore is exact from both."""
    model = gpt2().to(device)
    before = bits(model)
    with edit(model, EDITED, device=to) as session:
        assert {copied.device.type for copied in session.base().values()} == {to or device}
        with torch.no_grad():
            model.get_parameter(EDITED).mul_(1.1)
    assert_holds(model, before)


# ---- with an optimizer -----------------------------------------------------------------------------------------------


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        opt.step()


@pytest.mark.parametrize("cls", [paramstate.Adam, paramstate.AdamW])
@pytest.mark.parametrize("state", ["keep", "snapshot", "reset"])
def test_three_steps_an_edit_and_three_more_are_six_steps(cls: type[paramstate.Adam], state: str) -> None:
    """3 steps, edit, evaluation, restore and 3 more equal 6 steps without an edit, bit for bit, under any policy."""
    model = gpt2()
    opt = cls(model, lr=1e-2)
    straight, straight_opt = copy.deepcopy((model, opt))
    train(model, opt, 3)
    with opt.edit(EDITED, state=state):
        edit_fact(model, 1)
        logits(model)
    train(model, opt, 3)
    train(straight, straight_opt, 6)
    assert_same_bits(state_by_name(model, opt), state_by_name(straight, straight_opt))


@pytest.mark.parametrize(
    ("state", "inside", "restored"), [("keep", 4, 4), ("snapshot", 4, 3), ("reset", 1, 3)], ids=str
)
def test_a_policy_says_what_becomes_of_the_state(state: str, inside: int, restored: int) -> None:
    """State is kept as stepped, goes back and forth with the values, or starts afresh, as the policy says."""
    model = gpt2()
    opt = paramstate.AdamW(model, lr=1e-2)
    train(model, opt, 3)
    before = state_by_name(model, opt)[EDITED]
    with opt.edit(EDITED, state=state):
        edit_fact(model, 1)
        train(model, opt, 1)
        assert float(opt.state_of(EDITED)["step"]) == inside
    after = state_by_name(model, opt)[EDITED]
    assert same_bits(after["value"], before["value"])
    assert float(after["step"]) == restored
    assert same_bits(after["exp_avg"], before["exp_avg"]) == (state != "keep")


def test_fine_tuning_as_an_edit_is_taken_back_with_its_moments() -> None:
    """A few steps on one weight, as fine-tuning editors take, are undone with their moments, or kept with them."""
    model = gpt2()
    opt = paramstate.AdamW(model, lr=1e-2)
    train(model, opt, 2)
    before = state_by_name(model, opt)
    for keep in (False, True):
        with opt.edit(state="snapshot") as session:
            opt.freeze(paramstate.select(model) - paramstate.select(model, EDITED))
            train(model, opt, 3)
            opt.unfreeze(opt.frozen)
            assert [change.name for change in session.changes()] == [EDITED]
            if keep:
                session.commit()
        after = state_by_name(model, opt)
        assert_same_bits(after, before, [name for name in before if name != EDITED or not keep])
    assert float(after[EDITED]["step"]) == 5
