"""``save`` and ``load``: what a file keeps, by name, and who may read it where."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import paramstate
from paramstate import AdamW, Box, LoadError, load, save
from paramstate.checkpoint.loading import state_dict_at
from small_models import Layer, Net, assert_same_bits, set_gradients, state_by_name, train

TESTS = Path(__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "opt.safetensors"


def trained(net: nn.Module | None = None, **options: Any) -> tuple[Any, AdamW]:
    torch.manual_seed(5)
    net = Net() if net is None else net
    opt = AdamW(net, lr=0.01, **options)
    train(net, opt, range(3))
    return net, opt


def keys_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


# ---- another process, another order


ELSEWHERE = """
import sys
import torch
import paramstate
from small_models import Layer, Net, state_by_name, train

folder = sys.argv[1]
net = Net(())
for name in ("third", "first", "second"):
    net.add_module(name, Layer(("bias", "weight")))
net.load_state_dict(torch.load(folder + "/model.pt"))
opt = paramstate.AdamW(net, amsgrad=True)
report = paramstate.load(opt, folder + "/opt.safetensors")
assert report.matched_by == "name" and len(report.loaded) == 6, report
train(net, opt, [10])
torch.save({"state": state_by_name(net, opt), "ids": dict(opt.ids)}, folder + "/after.pt")
"""


def test_a_step_after_a_load_in_another_process_with_another_attribute_order_is_bit_identical(tmp_path: Path) -> None:
    net, opt = trained(amsgrad=True)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    save(opt, tmp_path / "opt.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], check=True, env=environment)
    train(net, opt, [10])
    after = torch.load(tmp_path / "after.pt")
    assert_same_bits(state_by_name(net, opt), after["state"])
    assert after["ids"] == dict(opt.ids)


def test_a_loaded_files_ids_win(path: Path) -> None:
    net, opt = trained()
    net.renamed = net.second
    del net.second
    opt.rename({"second.weight": "renamed.weight", "second.bias": "renamed.bias"})
    save(opt, path)
    fresh = AdamW(Net(("first", "third", "renamed")))
    assert fresh.ids["renamed.weight"] != opt.ids["renamed.weight"]
    load(fresh, path)
    assert fresh.ids == opt.ids


def test_orphan_growth_of_files(path: Path) -> None:
    """Twenty relaunches, in each of which a layer is exchanged: the file neither grows nor keeps what went."""
    net, opt = trained()
    save(opt, path)
    size, keys = path.stat().st_size, keys_in(path)
    for _ in range(20):
        net = copy.deepcopy(net)
        net.second = Layer()
        opt = AdamW(net)
        load(opt, path)
        train(net, opt, [1])
        save(opt, path)
        assert path.stat().st_size == size
    assert keys_in(path) == keys
    assert float(opt.state_of("second.weight")["step"]) == 23


def test_the_same_optimizer_gives_the_same_bytes_each_time_and_after_a_load(path: Path) -> None:
    net, opt = trained(constraints={"first.*": Box(-1.0, 1.0)})
    save(opt, path)
    first = path.read_bytes()
    save(opt, path)
    assert path.read_bytes() == first
    fresh = AdamW(copy.deepcopy(net))
    load(fresh, path)
    save(fresh, path)
    assert path.read_bytes() == first


# ---- by which keys


def test_tensors_stand_under_the_names_of_parameters(path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    opt = AdamW(net, lr=torch.tensor(0.1), constraints=Box(max=torch.ones(1, 2)))
    opt.freeze_rows("0.weight", [0])
    opt.materialize_state()
    opt.state_of("0.weight")["mine"] = {"a/b": torch.ones(2), "a": [torch.zeros(1)]}
    save(opt, path)
    assert keys_in(path) == [
        "param_groups/0/lr",
        "paramstate/traits/0.weight/constraint/max",
        "paramstate/traits/0.weight/rows/frozen",
        "paramstate/traits/0.weight/rows/offsets",
        "state/0.weight/exp_avg",
        "state/0.weight/exp_avg_sq",
        "state/0.weight/mine/a%2Fb",
        "state/0.weight/mine/a/0",
        "state/0.weight/step",
    ]


def test_moments_in_eight_bits_stand_there_as_codes_and_scales(path: Path) -> None:
    opt = AdamW(nn.Linear(64, 64, bias=False), state_dtype="8bit")
    opt.materialize_state()
    save(opt, path)
    keys = [f"state/weight/{key}/{part}" for key in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")]
    assert keys_in(path) == [*keys, "state/weight/step"]
    assert path.stat().st_size < 2 * 64 * 64 * 1.02 + 2000


def test_a_name_that_two_models_use_has_its_group_in_front(path: Path) -> None:
    def both(names: tuple[str, ...] = ("generator", "")) -> tuple[nn.ModuleList, AdamW]:
        models = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        groups = [
            {"params": list(model.named_parameters()), **({"name": name} if name else {})}
            for model, name in zip(models, names, strict=True)
        ]
        return models, AdamW(groups)

    models, opt = both()
    train(models, opt, [1, 2])
    save(opt, path)
    assert {key.split("/")[1] for key in keys_in(path)} == {"generator:weight", "1:weight"}
    others, fresh = both()
    others.load_state_dict(models.state_dict())
    assert load(fresh, path).loaded == ["generator:weight", "1:weight"]
    assert_same_bits(state_by_name(models, opt), state_by_name(others, fresh))
    _, renamed = both(("critic", ""))
    with pytest.raises(LoadError, match="missing in the state dict: 'critic:weight'; unexpected in it: 'generator:we"):
        load(renamed, path)


def test_parameters_without_names_are_called_by_their_position(path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = AdamW(net.parameters())
    train(net, opt, [1])
    save(opt, path)
    assert {key.split("/")[1] for key in keys_in(path)} == {"#0", "#1", "#2", "#3"}
    other = copy.deepcopy(net)
    fresh = AdamW(other.parameters())
    assert load(fresh, path).matched_by == "position"
    assert_same_bits(state_by_name(net, opt), state_by_name(other, fresh))


def test_a_name_that_looks_like_a_position_or_a_path_is_no_other_parameters(path: Path) -> None:
    torch.manual_seed(0)
    params = [(name, nn.Parameter(torch.randn(2))) for name in ("#1", "a/exp_avg", "$tensor", "a")]
    opt = AdamW(params[:1])
    opt.add_param_group({"params": params[1:]})
    for name, param in params:
        param.grad = torch.full((2,), float(len(name) + 1))
    opt.step()
    opt.state[params[0][1]]["a%2Fb"] = torch.ones(1)
    save(opt, path)
    assert "state/$tensor/exp_avg" in keys_in(path)
    assert "state/a%2Fexp_avg/exp_avg" in keys_in(path)
    assert "state/#1/a%252Fb" in keys_in(path)
    fresh = AdamW([(name, nn.Parameter(param.detach().clone())) for name, param in reversed(params)])
    load(fresh, path, strict=False)
    for name, _ in params:
        assert torch.equal(fresh.state_of(name)["exp_avg"], opt.state_of(name)["exp_avg"])


def test_a_parameter_without_a_name_is_not_taken_for_one_that_is_called_like_its_position(path: Path) -> None:
    net = nn.ParameterDict({"#1": nn.Parameter(torch.randn(2))})
    opt = AdamW([net["#1"], nn.Parameter(torch.randn(2))], model=net)
    for number, param in enumerate(opt.param_groups[0]["params"]):
        param.grad = torch.full((2,), number + 1.0)
    opt.step()
    save(opt, path)
    assert {key.split("/")[1] for key in keys_in(path)} == {"#1", "##1"}
    assert [held["exp_avg"][0] for held in state_dict_at(path)["state"].values()] == pytest.approx([0.1, 0.2])


def test_a_parameter_listed_twice_and_one_with_two_names_are_each_saved_once(path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    opt = AdamW(net)
    train(net, opt, [1])
    save(opt, path)
    assert len(keys_in(path)) == 3
    load(AdamW(copy.deepcopy(net)), path, strict_names=True)
    param = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = AdamW([param, param])
    twice.materialize_state()
    save(twice, path)
    assert len(keys_in(path)) == 3
    assert state_dict_at(path)["param_groups"][0]["params"] == [0, 0]
    load(twice, path)


def test_a_state_dict_that_a_hook_made_into_torchs_is_saved_by_the_names_that_were_given(path: Path) -> None:
    net, opt = trained()
    opt.register_state_dict_post_hook(lambda _, saved: {key: saved[key] for key in ("state", "param_groups")})
    save(opt, path)
    assert "state/second.bias/exp_avg" in keys_in(path)
    other = copy.deepcopy(net)
    fresh = AdamW(other)
    assert load(fresh, path).matched_by == "name"
    assert_same_bits(state_by_name(net, opt), state_by_name(other, fresh))


# ---- what a load does


def test_a_load_has_the_arguments_and_the_report_of_load_state_dict(path: Path) -> None:
    _, opt = trained()
    save(opt, path)
    saved = opt.state_dict(compact=True)
    smaller = Net(("first", "other"))
    for options in ({"strict": False}, {"strict": False, "names": {"second.weight": "other.weight"}}):
        report = load(AdamW(smaller), path, **options)
        assert report == AdamW(smaller).load_state_dict(saved, **options)
        assert report.loaded[:2] == ["first.weight", "first.bias"]
    with pytest.raises(LoadError, match=r"missing in the state dict: 'other\.weight', 'other\.bias'"):
        load(AdamW(smaller), path)
    with pytest.raises(LoadError, match="strict_names: the optimizer has no parameter names"):
        load(AdamW(Net().parameters()), path, strict_names=True)


def test_an_error_of_a_load_changes_nothing(path: Path) -> None:
    save(trained()[1], path)
    net = Net()
    net.second = nn.Linear(3, 5)
    opt = AdamW(net, lr=0.5)
    train(net, opt, [1])
    before, ids = state_by_name(net, opt), dict(opt.ids)
    with pytest.raises(LoadError, match=r"'second.weight': the saved 'exp_avg' has shape \[2, 3\]"):
        load(opt, path)
    assert_same_bits(state_by_name(net, opt), before)
    assert (opt.ids, opt.param_groups[0]["lr"]) == (ids, 0.5)


def test_what_was_loaded_does_not_hang_on_the_file(path: Path) -> None:
    net, opt = trained()
    opt.param_groups[0]["lr"] = torch.tensor(0.25)
    opt.freeze_rows("first.weight", [1])
    expected = state_by_name(net, opt)["first.weight"]
    opt.state_of("first.bias")["mine"] = [torch.ones(3)]
    fresh = AdamW(copy.deepcopy(net))
    seen: list[dict[str, Any]] = []
    fresh.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(state_dict["rest"]))
    opt.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(rest={"more": torch.ones(2)}))
    save(opt, path)
    load(fresh, path)
    with path.open("r+b") as file:  # in place: the file that was mapped
        file.write(b"\xff" * path.stat().st_size)
    loaded = fresh.state_of("first.weight")
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded[key], expected[key])
    assert fresh.param_groups[0]["lr"] == torch.tensor(0.25)
    assert fresh.state_of("first.bias")["mine"][0].tolist() == [1.0, 1.0, 1.0]
    assert fresh.row_steps("first.weight").tolist() == opt.row_steps("first.weight").tolist()
    assert seen[0]["more"].tolist() == [1.0, 1.0]


def test_state_goes_where_its_parameter_is(path: Path) -> None:
    save(trained()[1], path)
    with torch.device("meta"):
        elsewhere = AdamW(Net())
    load(elsewhere, path)
    state = elsewhere.state_of("first.weight")
    assert state["exp_avg"].device.type == "meta"
    assert state["step"].device.type == "cpu"


def test_the_learning_rate_of_a_file_is_exact_and_its_kinds_stay(path: Path) -> None:
    net = Net()
    shared = torch.tensor(0.1, dtype=torch.float64)
    opt = AdamW(
        [{"params": net.first, "betas": (torch.tensor(0.9), 0.999)}, {"params": net.second, "eps": 1e-8 / 3}],
        lr=shared,
        model=net,
    )
    opt.param_groups[1].update(initial_lr=0.1 + 0.2, schedule={"milestones": [3, 5], 7: (1, "x", None, float("inf"))})
    opt.param_groups[0]["foreach"] = False
    save(opt, path)
    fresh = AdamW([{"params": net.first}, {"params": net.second}], model=net)
    load(fresh, path)
    first, second = fresh.param_groups
    assert (first["lr"].dtype, first["lr"].item()) == (torch.float64, shared.item())
    assert first["lr"] is not second["lr"]
    assert isinstance(first["betas"], tuple)
    assert torch.equal(first["betas"][0], torch.tensor(0.9))
    assert (first["betas"][1], first["foreach"]) == (0.999, False)
    assert (second["eps"], second["initial_lr"]) == (1e-8 / 3, 0.1 + 0.2)
    assert second["schedule"] == {"milestones": [3, 5], 7: (1, "x", None, float("inf"))}


def test_a_function_that_constrains_is_not_saved_and_reported_as_missing(path: Path) -> None:
    net, opt = trained(constraints={"first.weight": torch.relu, "second.weight": Box(0.0, 1.0)})
    save(opt, path)
    other = copy.deepcopy(net)
    fresh = AdamW(other)
    assert load(fresh, path).undeclared == ["first.weight"]
    fresh.param_groups[0]["lr"] = 10.0
    train(other, fresh, [3])
    assert bool(other.first.weight.min() < 0)
    assert bool(other.second.weight.min() >= 0)


# ---- who may


@pytest.mark.parametrize("function", ["save", "load"])
def test_an_optimizer_of_torchs_is_refused_with_what_to_do(function: str, path: Path) -> None:
    net = Net()
    stock = torch.optim.AdamW(net.named_parameters())
    with pytest.raises(TypeError) as caught:
        getattr(paramstate, function)(stock, path)
    assert str(caught.value) == (
        f"{function} takes a paramstate.Adam or AdamW, got torch.optim.adamw.AdamW; of a wrapper give the optimizer "
        "inside; torch's own state goes on in one of ours: paramstate.AdamW(model).load_state_dict(opt.state_dict())"
    )
    assert not path.exists()
    train(net, stock, [1])
    ours = AdamW(net)
    ours.load_state_dict(stock.state_dict())
    save(ours, path)
    assert load(AdamW(net), path).matched_by == "name"


def test_a_save_waits_for_a_step_that_another_thread_takes(path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    opt = AdamW(net)
    set_gradients(net, 1)
    opt.step()
    done = threading.Event()

    def steps() -> None:
        while not done.is_set():
            opt.step()

    stepping = threading.Thread(target=steps)
    stepping.start()
    try:
        for _ in range(20):
            save(opt, path)
            assert len({float(held["step"]) for held in state_dict_at(path)["state"].values()}) == 1
    finally:
        done.set()
        stepping.join()


def test_a_load_says_what_to_install_where_safetensors_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, opt = trained()
    save(opt, path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"paramstate\.load needs safetensors: pip install 'paramstate\[torch\]'"):
        load(opt, path)
