"""The configuration: recipes, batch sizes, and rejections that name option, value and remedy."""

from __future__ import annotations

import dataclasses
import json
from itertools import chain
from typing import Any

import pytest
import typer
from conftest import sized

from distrib.config import CHOICES, LARGEST_SEED, MAY_CHANGE, RECIPES, Config, build, options, require_types
from distrib.errors import UserError
from distrib.options import owners
from distrib.train import parse, plain, with_options
from nn.ops.loss import LOSSES
from nn.optim import OPTIMIZERS, SCHEDULES
from nn.resnet9 import VARIANTS

pytestmark = pytest.mark.quick

AT_LEAST_1 = (
    "epochs",
    "batch_size",
    "batch_size_per_rank",
    "limit_train",
    "limit_test",
    "log_every",
    "checkpoint_every",
    "keep",
    "max_steps",
)
ABOVE_0 = ("lr", "width", "timeout")
NOT_NEGATIVE = ("momentum", "weight_decay", "warmup_epochs")
NAN, INF = float("nan"), float("inf")

REJECTED: list[tuple[dict[str, Any], str, str]] = [
    *(({name: value}, f"--{name} {value}", "1 or more") for name in AT_LEAST_1 for value in (0, -3)),
    *(
        ({name: value}, f"--{name} {value}", "above 0")
        for name in ABOVE_0
        for value in (0.0, -1.0, NAN, INF, -INF)
    ),
    *(
        ({name: value, "optimizer": "sgd"}, f"--{name} {value}", "0 or more")
        for name in NOT_NEGATIVE
        for value in (-0.5, NAN, INF)
    ),
    *(({name: "nosuch"}, f"--{name} nosuch", ", ".join(values)) for name, values in CHOICES.items()),
    ({"seed": -1}, "--seed -1", "0 or more"),
    ({"seed": 10**4000}, f"--seed 1{'0' * 58}…", f"{LARGEST_SEED} or less"),
    ({"batch_size": 10**20}, "--batch_size 100000000000000000000", "1000000 or less"),
    ({"batch_size_per_rank": 1_000_001}, "--batch_size_per_rank 1000001", "1000000 or less"),
    ({"momentum": 1.0, "optimizer": "sgd"}, "--momentum 1.0", "less than 1"),
    ({"momentum": 0.9}, "--momentum 0.9", "--optimizer sgd"),
    ({"nesterov": True, "optimizer": "sgd"}, "--nesterov True", "--momentum above 0"),
    ({"width": 65.0}, "--width 65.0", "64 or less"),
    ({"warmup_epochs": 1.0, "schedule": "onecycle"}, "--warmup_epochs 1.0", "leave it out"),
    ({"warmup_epochs": 3.0, "epochs": 2}, "--warmup_epochs 3.0", "--epochs 2"),
    ({"recipe": "nosuch"}, "--recipe nosuch", ", ".join(RECIPES)),
    ({"batch_size": 8, "batch_size_per_rank": 2}, "--batch-size-per-rank 2", "not both"),
]


@pytest.mark.parametrize(("given", "named", "remedy"), REJECTED, ids=lambda value: str(value)[:40])
def test_rejections_name_option_value_and_remedy(given: dict[str, Any], named: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        build(given)
    text = str(caught.value)
    option, _, value = named.partition(" ")
    assert text.startswith(f"{option.replace('_', '-')} {value}: ")
    assert remedy in text
    assert "\n" not in text


def test_a_number_with_bytes_that_are_no_text() -> None:
    with pytest.raises(Exception, match=r"--epochs \?: give a whole number"):
        parse(["--epochs", "\udc80"])


def test_defaults_are_valid_and_frozen() -> None:
    config = build({})
    assert config == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fills_in_and_given_options_win(name: str) -> None:
    recipe = RECIPES[name]
    config = build({"recipe": name})
    assert {key: getattr(config, key) for key in recipe} == recipe
    changed = build({"recipe": name, "lr": 0.5, "epochs": 2, "seed": None})
    assert (changed.lr, changed.epochs, changed.batch_size) == (0.5, 2, recipe["batch_size"])
    assert changed.recipe == name


def test_recipe_with_batch_per_rank() -> None:
    """The recipe's batch size gives way; only a person's own two batch sizes contradict each other."""
    assert build({"recipe": "demo", "batch_size_per_rank": 4}).resolve(3, sized(60000, 100)).batch_size == 12


def test_a_recipe_does_not_weaken_validation() -> None:
    with pytest.raises(UserError, match=r"--warmup-epochs 1\.0: onecycle"):
        build({"recipe": "demo", "warmup_epochs": 1.0})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_resolved_batch(size: int) -> None:
    assert build({"batch_size": 8}).resolve(size, sized(100, 100)).batch_size == 8
    each = build({"batch_size_per_rank": 8}).resolve(size, sized(100, 100))
    assert each.batch_size == 8 * size
    assert each.resolve(size, sized(100, 100)) == each, "resolving twice changes nothing"


def test_batch_below_the_number_of_ranks() -> None:
    assert build({"batch_size": 4}).resolve(4, sized(100, 100)).batch_size == 4
    with pytest.raises(UserError, match=r"--batch-size 3: .*ranks, 4.* give 4 or more, or start fewer ranks"):
        build({"batch_size": 3}).resolve(4, sized(100, 100))


@pytest.mark.parametrize(("option", "limit"), [("limit_train", 65), ("limit_test", 33)])
def test_limit_beyond_the_data(option: str, limit: int) -> None:
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {limit}: .*only {limit - 1} images"):
        build({option: limit}).resolve(1, sized(64, 32))
    assert getattr(build({option: limit - 1}).resolve(1, sized(64, 32)), option) == limit - 1


def test_a_recipe_gives_way_to_another_optimizer_or_loss() -> None:
    adam = build({"recipe": "demo", "optimizer": "adam"})
    assert (adam.momentum, adam.nesterov, adam.weight_decay, adam.lr) == (0, False, 0, 1e-3)
    assert (adam.width, adam.label_smoothing) == (0.125, 0.1)
    assert build({"recipe": "demo", "optimizer": "adam", "lr": 0.02}).lr == 0.02
    assert build({"recipe": "demo", "loss": "bce"}).label_smoothing == 0
    plain = build({"recipe": "demo", "momentum": 0.0})
    assert (plain.momentum, plain.nesterov, plain.lr) == (0, False, RECIPES["demo"]["lr"])
    assert build({"recipe": "demo", "nesterov": False}).momentum == 0.9
    assert parse(["--recipe", "demo", "--no-nesterov"]).nesterov is False
    assert parse(["--recipe", "demo"]) == build({"recipe": "demo"})


VALUE = {
    "int": [["-3"], ["1_0"]],
    "float": [["0.25"], ["-1e-3"], ["inf"]],
    "str": [["x y"], [""], ["-"]],
    "bool": [[]],
}
"""By type, what may stand after an option."""


def test_what_needs_no_advice_is_read_as_typer_reads_it() -> None:
    """And without its import, which takes as long as NumPy's."""
    found: list[dict[str, Any]] = []
    app = typer.Typer(add_completion=False)
    app.command()(with_options(lambda **given: found.append(given)))
    lines: list[list[str]] = []
    for name, kind, _, _ in options():
        flag, base = f"--{name.replace('_', '-')}", kind.split(" | ")[0]
        flags = [flag, f"--no-{flag[2:]}"] if base == "bool" else [flag]
        lines += [[each, *value] for each in flags for value in VALUE[base]]
    for line in ([], *lines, [*chain(*lines)], [*chain(*lines[::-1])]):
        app(line, standalone_mode=False)
        assert plain(line) == {name: value for name, value in found.pop().items() if value is not None}, line


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "run",
        "--lr",
        "--lr x",
        "--lr=1",
        "--model --nesterov",
        "--epochs 1.5",
        "--no-lr 1",
        "--nosuch 1",
        "--",
    ],
)
def test_all_else_is_left_to_typer(line: str) -> None:
    assert plain(["--width", "1", *line.split()]) is None


def test_dtype_follows_precision() -> None:
    assert build({"precision": "float64"}).dtype == "float64"
    assert build({"precision": "tf32"}).dtype == build({}).dtype == "float32"


def test_json_round_trip() -> None:
    config = build({"recipe": "demo", "data": "/some/where", "limit_train": 10})
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert config.differences(json.loads(json.dumps(dataclasses.asdict(config)))) == []


OTHER = {
    "batch_size": 9,
    "optimizer": "sgd",
    "lr": 0.5,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "loss": "bce",
    "label_smoothing": 0.1,
    "warmup_epochs": 1.0,
    "model": "lenet",
    "variant": "avgpool",
    "width": 0.5,
    "reproducible": True,
    "batch_norm": "local",
    "precision": "float64",
    "limit_train": 5,
    "limit_test": 5,
    "seed": 1,
    "gradients": "bf16",
    "shift": 2.0,
    "rotate": 10.0,
    "flip": True,
    "crop": 3,
    "cutout": 5,
    "validation": 0.2,
    "split": "letters",
    "size": "32",
    "grey": True,
    "average": 0.99,
}


@pytest.mark.parametrize("name", OTHER)
def test_differences_name_the_option_and_both_values(name: str) -> None:
    stored = dataclasses.asdict(build({}))
    found = build({name: OTHER[name]}).differences(stored)
    assert found == [f"--{name.replace('_', '-')} {OTHER[name]} (the run has {stored[name]})"]


def test_an_older_version_s_run_has_what_came_later_at_its_default() -> None:
    stored = dataclasses.asdict(build({}))
    for name in ("shift", "rotate", "flip", "crop", "cutout", "average", "model", "split", "size", "grey"):
        del stored[name]
    assert build({}).differences(stored) == []
    assert build({"shift": 2.0}).differences(stored) == ["--shift 2.0 (the run has 0.0)"]


HELD_BACK = {"keep_best": (True, False), "patience": (3, None), "shards": (5, None)}
"""Options that need --validation or --reproducible: a value, and the default."""


@pytest.mark.parametrize("name", HELD_BACK)
def test_differences_of_what_needs_another_option(name: str) -> None:
    (value, default), option = HELD_BACK[name], f"--{name.replace('_', '-')}"
    needed = {"validation": 0.1, "reproducible": True}
    stored = dataclasses.asdict(build(needed))
    found = build({**needed, name: value}).differences(stored)
    assert found == [f"{option} {value} (the run has {default})"]


def test_differences_of_momentum() -> None:
    sgd = build({"optimizer": "sgd", "momentum": 0.5})
    other = build({"optimizer": "sgd", "momentum": 0.9, "nesterov": True})
    assert other.differences(dataclasses.asdict(sgd)) == [
        "--momentum 0.9 (the run has 0.5)",
        "--nesterov True (the run has False)",
    ]


def test_every_option_is_either_free_or_guarded() -> None:
    names = {name for name, *_ in options()}
    assert set(MAY_CHANGE) <= names
    assert names - set(MAY_CHANGE) == {*OTHER, "momentum", "nesterov", "epochs", *HELD_BACK}


def test_epochs_may_change_with_a_constant_rate_only() -> None:
    assert build({"epochs": 9}).differences(dataclasses.asdict(build({}))) == []
    cosine = build({"epochs": 9, "schedule": "cosine"})
    stored = dataclasses.asdict(build({"epochs": 8, "schedule": "cosine"}))
    assert cosine.differences(stored) == ["--epochs 9 (the run has 8)"]


def test_free_options_may_differ() -> None:
    stored = dataclasses.asdict(build({}))
    free = build(
        {
            "backend": "numpy",
            "comm": "none",
            "max_steps": 3,
            "log_every": 1,
            "checkpoint_every": 2,
            "keep": 9,
            "run_dir": "x",
            "resume": "none",
            "timeout": 5.0,
            "data": "elsewhere",
        }
    )
    assert free.differences(stored) == []


@pytest.mark.parametrize("recipe", ["demo", "fast99"])
def test_a_recipe_s_limit_is_a_cap_and_a_person_s_a_demand(recipe: str) -> None:
    config = build({"recipe": recipe})
    few = config.resolve(1, sized(64, 32))
    assert few.limit_train == 64
    assert few.resolve(1, sized(64, 32)) == few
    assert few.differences(json.loads(json.dumps(dataclasses.asdict(few)))) == []
    assert config.resolve(1, sized(RECIPES[recipe]["limit_train"], 32)) == config
    given = build({"recipe": recipe, "limit_train": RECIPES[recipe]["limit_train"]})
    with pytest.raises(UserError, match=r"--limit-train \d+: the data has only 64 images"):
        given.resolve(1, sized(64, 32))


@pytest.mark.parametrize("name", ["run_dir", "data", "resume"])
def test_paths_may_begin_at_home(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    option = f"--{name.replace('_', '-')}"
    assert getattr(build({name: "~/a"}), name) == "/home/of/mine/a"
    assert getattr(build({name: "~root/a"}), name).endswith("/a")
    assert getattr(build({name: "a/~/b"}), name) == "a/~/b"
    for wrong, message in (
        (
            "~nobodyatall/a",
            f"{option} ~nobodyatall/a: there is no user nobodyatall: give the whole path, or ./~",
        ),
        ("", f"{option} (nothing): give a name"),
        ("a\0\x1bb", f"{option} a??b: give a name"),
    ):
        with pytest.raises(UserError) as caught:
            build({name: wrong})
        assert str(caught.value).startswith(message)


WRONG = [
    ("epochs", "8"),
    ("epochs", 8.0),
    ("epochs", None),
    ("lr", True),
    ("lr", "x"),
    ("data", 3),
    ("nesterov", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_stored_value_of_another_type(name: str, value: Any) -> None:
    stored = dataclasses.asdict(build({"seed": 1 << 100, "lr": 1}))
    require_types(stored, "config.json")
    with pytest.raises(UserError, match=rf"^config\.json: has {name} .*, not .*: restore the file$"):
        require_types({**stored, name: value}, "config.json")


def test_a_stored_value_is_shown_in_a_line() -> None:
    text = build({}).differences({**dataclasses.asdict(build({})), "loss": "\x1b\n" + "x" * 10_000})[0]
    assert text.isprintable()
    assert len(text) < 120


@pytest.mark.parametrize(
    ("name", "table"),
    [("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("loss", LOSSES), ("variant", VARIANTS)],
)
def test_what_can_be_chosen_is_what_is_there(name: str, table: dict) -> None:
    """The choices are a table's names: one that is listed and not implemented cannot exist."""
    assert CHOICES[name] == tuple(table)
    for choice in table:
        assert getattr(Config(**{name: choice}), name) == choice


def test_an_option_belongs_to_the_optimizers_that_name_it() -> None:
    helps = {name: text for name, _, _, text in options()}
    for name, value in (("momentum", 0.9), ("nesterov", True)):
        assert f"of {owners(name)}" in helps[name]
        with pytest.raises(UserError, match=f"--{name} {value}: is of --optimizer sgd only"):
            Config(**{name: value})
    assert Config(weight_decay=0.1).weight_decay == 0.1
