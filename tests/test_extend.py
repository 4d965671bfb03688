"""docs/extend.md as a user follows it: its code in a module of one's own, its blocks in params.yaml, up to a table."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ruamel.yaml import YAML

from ld3m.models.networks import Network
from ld3m.pipeline import runs
from ld3m.pipeline.blocks import Extension
from ld3m.pipeline.cells import cell_of, first_runs
from ld3m.pipeline.experiment import Experiment
from ld3m.pipeline.profiles import apply_profiles, load_params
from ld3m.reporting.tables import paper_style, scores_of, summarize
from ld3m.runtime import paths

TEXT = (paths.ROOT / "docs/extend.md").read_text()
PYTHON, BLOCKS = (re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.DOTALL) for kind in ("python", "yaml"))
CONTROL = {"ipc": 1, "runs": [0], "table": "main", "prior": "data"}
SMALL = """
datasets: {smoke: {classes: null}}
architectures: [convnet, vit, mlp]
controls:
  random_real-1: {control: random_real, ipc: 1, runs: [0], table: main, prior: data}
networks: {mlp: {width: 8}}
evaluate: {recipe: {epochs: {mlp: 2}, learning_rates: {mlp: 0.01}}, recipe_overrides: {}}
distill: {dm: {small: {iterations: 2}}, moments: {ld3m: {iterations: 2}}}
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The folder of mine.py and of params.yaml with the blocks of the document, made small."""
    (tmp_path / "mine.py").write_text("\n\n".join(code for code in PYTHON if "def recovered" not in code))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    values = {}
    for text in (*BLOCKS, SMALL):
        values = merged(values, YAML(typ="safe").load(text))
    (tmp_path / "mine.yaml").write_text("")
    YAML(typ="safe").dump(values, tmp_path / "mine.yaml")
    return tmp_path


def merged(below, above):
    both = {key: merged(below[key], value) for key, value in above.items() if isinstance(below.get(key), dict)}
    return below | above | both


def test_what_the_document_adds_runs_to_a_table(written, monkeypatch):
    apply_profiles("smoke", written / "mine.yaml", path=written / "params.yaml")
    params = load_params(path=written / "params.yaml")
    (written / "runs/smoke").mkdir(parents=True)
    for place, source in {"runs/smoke/prior": "runs/mnist5k/prior", "data": "data"}.items():
        (written / place).symlink_to(paths.ROOT / source)
    monkeypatch.setattr(paths, "ROOT", written)
    experiment, found = Experiment(params), first_runs(params)
    assert len(experiment.synthetic("small", 1).labels) == 10  # as notebooks call it
    assert {cell.key for cell in found} == {"moments-ld3m-1", "dm-small-1", "class_mean-1", "random_real-1"}
    for cell in found:
        if cell.objective != "none":
            runs.distill_runs(experiment, cell)
        runs.evaluate_runs(experiment, cell)
    table = paper_style(summarize(scores_of(params, found)))
    assert set(table.Set) == {"moments LD3M", "DM small", "class_mean", "Random real"}
    assert list(table.columns) == ["IPC", "Set", "ConvNet", "ViT", "mlp"]


def test_each_block_is_valid_each_example_short_and_the_statistic_the_one_described(written):
    for block in BLOCKS:
        (written / "block.yaml").write_text(block)
        apply_profiles(written / "block.yaml", path=written / "params.yaml")
    assert all(sum(bool(line.strip()) for line in code.splitlines()) < 20 for code in PYTHON)
    scope = {}
    exec(next(code for code in PYTHON if "def recovered" in code), scope)
    assert scope["recovered"](accuracy=0.6, random_real=0.4, full_data=0.8) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"networks.convnet": {"factory": "nowhere:thing"}}, "factory = 'nowhere:thing': cannot be imported"),
        ({"networks.convnet": {"factory": "json:thing"}}, "'json:thing': cannot be imported .AttributeError"),
        ({"networks.convnet": {"factory": "json:dumps"}}, "a required argument: 'obj'; it is called as factory"),
        (
            {"networks.convnet": {"factory": "json"}},
            "networks.convnet.factory: must be an import path, package.module:name",
        ),
        ({"controls": {"a": CONTROL | {"control": "math:pi"}}}, "controls.a.control = 'math:pi': .*not a callable"),
    ],
)
def test_a_factory_that_is_missing_or_cannot_be_called_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        load_params(changes)


def space(images, labels, **changes):
    learned = images.clone().requires_grad_()
    made = {"labels": labels, "learnables": {"images": learned}, "tensors": dict, "render": lambda step: learned}
    return SimpleNamespace(**made | changes)


class Plain(Network):
    def __init__(self, *, channels, size_px, classes, norm=False):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), *([torch.nn.BatchNorm1d(channels * size_px**2)] * norm))
        self.classifier = torch.nn.Linear(channels * size_px**2, classes)


class Returns:
    def __init__(self, *returned, **learnables):
        self.returned, self.learnables = returned, learnables

    def __call__(self, images, labels, *, step):
        return self.returned


ONES = torch.ones(10, 3, 32, 32)


@pytest.mark.parametrize(
    "kind, factory, words",
    [
        *((kind, lambda *_, **__: None, "returned None, ") for kind in ("objective", "space", "network", "control")),
        ("objective", lambda split, **_: print, "lacks the dict `learnables`"),
        ("objective", lambda split, **_: Returns(rate=torch.ones(2)), "its learnable rate is .* one positive number"),
        ("objective", lambda split, **_: Returns(rate=torch.zeros(()).requires_grad_()), "rate is .* one positive num"),
        ("objective", lambda split, **_: Returns(1.0, None), "objective is None, not a tensor .10, 3, 32, 32."),
        ("objective", lambda split, **_: Returns(1.0, ONES[0]), r"is a tensor \(3, 32, 32\), not a tensor \(10, 3"),
        ("objective", lambda split, **_: Returns(ONES, ONES), "returned a tuple, not .number, gradient."),
        ("space", lambda x, labels, **_: SimpleNamespace(labels=labels, learnables={}), "which lacks render, tensors"),
        ("space", lambda x, labels, **_: space(x[:, :1], labels), r"gave a tensor \(10, 1, 32, 32\), not .*10, 3, "),
        ("space", lambda x, labels, **_: space(x, labels.flip(0)), "`labels` are not those"),
        (
            "space",
            lambda x, labels, **_: space(x, labels, learnables={"a": x}),
            "learnable a is no leaf that requires_",
        ),
        ("space", lambda x, labels, **_: space(x, labels, render=lambda step: x), "render.. has no gradient"),
        ("network", lambda **given: Plain(**given, norm=True), "has buffers"),
        ("network", lambda **given: Plain(**given | {"classes": 3}), r"a tensor \(2, 3\) for 2 images, not .2, 10."),
        ("control", lambda run, ipc: (ONES[1:], torch.arange(10)), r"\(9, 3, 32, 32\), not \(10, 3"),
    ],
)
def test_what_a_factory_returns_is_checked_where_it_is_made(kind, factory, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(made=factory))
    params, block = load_params(), Extension(factory="mine:made")
    for blocks in (params.objectives.__pydantic_extra__, params.spaces.__pydantic_extra__, params.networks):
        monkeypatch.setitem(blocks, "mine", block)
    experiment = Experiment(params)
    with pytest.raises(ValueError, match=f"= 'mine:made': .*{words}.*; see docs/extend.md"):
        match kind:
            case "objective":
                experiment.objective("mine")(*experiment.initial(1), step=0)
            case "space":
                experiment.synthetic("mine", 1)
            case "network":
                experiment.new_network("mine")(seed=0)
            case "control":
                experiment.control("mine:made", 1)


def test_all_runs_share_what_is_loaded(monkeypatch):
    loads, dataset = [], SimpleNamespace(train=SimpleNamespace(classes=("a", "b")))
    monkeypatch.setattr("ld3m.pipeline.experiment.data.load_dataset", lambda **given: loads.append(given) or dataset)
    experiment = Experiment(load_params())
    assert experiment.of_run(2).dataset is experiment.dataset is experiment.of_run(1).dataset and len(loads) == 1
    assert experiment.of_run(2).seed != experiment.seed
    monkeypatch.setattr(Experiment, "distill", lambda self, cell: self.dataset)
    cell = replace(cell_of(experiment.params, "dm-ld3m-1"), runs=(0, 1, 2))
    alone = replace(experiment, params=load_params({"processes": 1}))
    assert runs.distill_runs(alone, cell) == 3 * [experiment.dataset] and len(loads) == 1
