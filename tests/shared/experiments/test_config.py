from dataclasses import dataclass, field

import pytest

from shared.experiments.config import capped, load_config
from shared.experiments.errors import UserError


@dataclass
class Model:
    width: int = capped(64, 16)
    depth: int = 2


@dataclass
class Config:
    lr: float = 1e-3
    steps: int = capped(100, 5)
    sizes: list[int] = capped([1, 10, 100], 20)
    limit: int | None = capped(None, 3)
    name: str = "x"
    model: Model = field(default_factory=Model)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError("lr must be above 0")


@dataclass
class Needy:
    data: str
    steps: int = 1


def test_later_layers_and_then_overrides_win():
    layers = [("a.yaml", {"steps": 1, "lr": 0.1, "model": {"width": 8}}), ("b", {"steps": 2, "name": "b"})]
    config = load_config(Config, *layers, overrides=["lr=1e-4", "model.depth=7"])
    assert config == Config(lr=1e-4, steps=2, name="b", model=Model(8, 7))


def test_smoke_clips_capped_fields_only():
    config = load_config(Config, ("a", {"limit": 9, "model": {"width": 4}}), smoke=True)
    assert config == Config(steps=5, sizes=[1, 10, 20], limit=3, model=Model(4, 2))
    assert load_config(Config, smoke=True).limit is None


@pytest.mark.parametrize(
    ("cls", "values", "overrides", "message"),
    [
        (Config, {"stps": 1}, [], r"c\.yaml: unknown config key 'stps' .did you mean 'steps'.*valid: lr, steps, sizes"),
        (Config, {"model": {"widht": 1}}, [], r"c\.yaml: unknown config key 'model\.widht'.*'model\.width'"),
        (Config, {"steps": "many"}, [], r"c\.yaml: steps: .*'many'"),
        (Config, {}, ["stps=1"], r"command line: unknown config key 'stps'"),
        (Config, {}, ["steps=many"], r"command line: steps: .*'many'"),
        (Config, {}, ["steps"], r"override 'steps' is not of the form key=value"),
        (Config, {}, ["sizes=[1"], r"overrides 'sizes=\[1'"),
        (Config, {"lr": -1}, [], r"c\.yaml: lr must be above 0"),
        (Needy, {}, [], r"c\.yaml: no value for data"),
    ],
)
def test_a_mistake_names_its_place_and_key(cls, values, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(cls, ("c.yaml", values), overrides=overrides)
