"""Tests of plans from files and from the command line, with valid and invalid input."""

import pytest
import yaml

from anomalib_ot.comparison import read_plan

PADIM = {"class_path": "Padim", "init_args": {"n_features": 10}}
MODELS = {"PaDiM": PADIM, "Flow": {"class_path": "WtFlow", "init_args": {"layers": ["blocks.4"]}}}
DATA = {"tray": {"class_path": "Assembly"}, "mvtec": {"class_path": "MVTecAD", "categories": ["bottle", "cable"]}}


def test_file_and_command_line(tmp_path):
    path = tmp_path / "plan.yaml"
    (tmp_path / "published.csv").write_text("category,model,metric,value,source\ntray,PaDiM,image_AUROC,90.1,nobody\n")
    content = {
        "models": MODELS,
        "data": DATA,
        "seeds": [3],
        "baseline": "PaDiM",
        "ensembles": ["PaDiM+Flow"],
        "reference": "published.csv",
    }
    path.write_text(yaml.safe_dump(content))
    plan = read_plan(path)
    assert (plan.seeds, plan.ensembles, plan.baseline) == ((3,), ("PaDiM+Flow",), "PaDiM")
    assert plan.published()[0]["value"] == "90.1"

    chosen = read_plan(path, ["Flow", "Patchcore"], [{"class_path": "Assembly"}], tmp_path, seeds=[0, 1], layers=None)
    assert [*chosen.models] == ["Flow", "Patchcore"]
    assert (chosen.seeds, chosen.ensembles, chosen.baseline) == ((0, 1), (), None)
    assert chosen.data["Assembly"]["init_args"]["root"] == str(tmp_path)

    alone = read_plan(None, ["Padim"], ["Assembly"])
    assert [str(job.key) for job in alone.jobs()] == ["Padim on Assembly, seed 0"]


def test_a_post_processor_is_part_of_a_model(tmp_path):
    own = {"post_processor": {"class_path": "anomalib_ot.decide.ConformalPostProcessor"}}
    path = tmp_path / "plan.yaml"
    path.write_text(
        yaml.safe_dump(
            {"models": {"PaDiM": {"class_path": "Padim", "init_args": {**own, "pre_trained": False}}}, "data": DATA}
        )
    )
    (job, *_) = read_plan(path).jobs()
    assert job.model["init_args"]["post_processor"] == own["post_processor"]
    assert type(job.create_model().post_processor).__name__ == "ConformalPostProcessor"


def test_relative_roots_start_from_the_given_folder(tmp_path):
    within = {"class_path": "Assembly", "init_args": {"root": "part"}}
    data = {
        "a": within,
        "b": {"class_path": "Assembly"},
        "c": {"class_path": "FewShot", "init_args": {"datamodule": within}},
        "d": {"class_path": "FewShot", "init_args": {"datamodule": "Assembly"}},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"models": MODELS, "data": data}))
    found = read_plan(path, root=tmp_path).categories()
    own = [config["init_args"] for config in found.values()]
    roots = [init_args.get("datamodule", {"init_args": init_args})["init_args"]["root"] for init_args in own]
    assert roots == [str(tmp_path / "part"), str(tmp_path)] * 2


@pytest.mark.parametrize("text", ["[1, 2]", "models: {}\nmodel: {}\n"])
def test_file_that_is_no_plan(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a plan of a comparison"):
        read_plan(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("models", [1]),
        ("data", 3),
        ("seeds", 1),
        ("shots", [{"a": 1}]),
        ("ensembles", [["PaDiM", "Flow"]]),
        ("reference", 0.5),
        ("image_size", [32]),
        ("layers", "layer1"),
    ],
)
def test_values_of_another_form_are_named_with_the_file(tmp_path, name, value):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"models": MODELS, "data": DATA, name: value}))
    with pytest.raises(ValueError, match=rf"plan\.yaml: .*{name}"):
        read_plan(path)


@pytest.fixture
def read(tmp_path):
    """Reads a plan of this text."""

    def read(text, **options):
        (tmp_path / "plan.yaml").write_text(text)
        return read_plan(tmp_path / "plan.yaml", **options)

    return read


WHOLE = {"models": "models: {PaDiM: {class_path: Padim}}", "data": "data: {tray: {class_path: Assembly}}"}


def text_of(changes):
    return "\n".join({**WHOLE, **changes}.values())


@pytest.mark.parametrize(
    "options", [{}, {"root": "."}, {"models": ["PaDiM"]}, {"data": ["Assembly"], "models": ["Padim"]}]
)
def test_a_key_that_is_left_empty_counts_as_absent(read, tmp_path, options):
    options = {name: tmp_path if name == "root" else value for name, value in options.items()}
    model = (
        "models:\n  PaDiM:\n    class_path: Padim\n    init_args:\n    trainer:\n    shots:\n    image_size:\n    why:"
    )
    data = "data:\n  tray:\n    class_path: Assembly\n    init_args:\n    categories:"
    empty = "title:\nseeds:\nshots:\nensembles:\nbaseline:\nreference:\ntrainer:\nlayers:\nbackbone:\nimage_size:"
    assert read(f"{model}\n{data}\n{empty}", **options) == read(text_of({}), **options)


@pytest.mark.parametrize(
    "options", [{}, {"root": True}, {"models": ["PaDiM", "Patchcore"]}, {"data": ["Assembly", "tray"]}]
)
@pytest.mark.parametrize(
    "changes",
    [
        {"data": "data: [Assembly]"},
        {"data": "data: {a: Assembly}"},
        {"data": "data: {a: }"},
        {"data": "data: {a: {class_path: Assembly}, b: [1]}"},
        {"data": "data: Assembly"},
        {"models": "models: [Padim]"},
        {"models": "models: {a: Padim}"},
        {"models": "models: {a: }"},
        {"more": "ensembles: 3"},
        {"more": "ensembles: [[PaDiM, Flow]]"},
        {"more": "ensembles: {a: b}"},
        {"more": "seeds: [1.5]"},
    ],
)
def test_another_form_is_refused_in_words_whatever_else_is_given(read, tmp_path, changes, options):
    options = {name: tmp_path if name == "root" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=r"plan\.yaml: "):
        read(text_of(changes), **options)


@pytest.mark.parametrize(
    "init_args",
    [
        "[root]",
        "root",
        "3",
        "{root: 3}",
        "{root: [a]}",
        "{datamodule: 3}",
        "{datamodule: {init_args: 3}}",
        "{root: {}}",
        "[]",
        "{root: 0}",
    ],
)
def test_arguments_of_another_form_are_refused_below_a_root_too(read, tmp_path, init_args):
    with pytest.raises(ValueError, match="tray: "):
        read(text_of({"data": f"data: {{tray: {{class_path: Assembly, init_args: {init_args}}}}}"}), root=tmp_path)


def test_a_root_of_null_is_that_which_is_given(read, tmp_path):
    plan = read(text_of({"data": "data: {tray: {class_path: Assembly, init_args: {root: null}}}"}), root=tmp_path)
    assert plan.data["tray"]["init_args"]["root"] == str(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "title: 2024-01-01",
        "trainer: {max_time: 2024-01-01}",
        "trainer: {limit_train_batches: .nan}",
        "trainer: &it {strategy: *it}",
        'title: "\\ud800"',
        f"trainer: {'[' * 3000}{']' * 3000}",
    ],
    ids=["date", "date within", "nan", "itself", "half a letter", "deep"],
)
def test_what_no_file_of_results_can_hold_is_refused_before_anything_runs(read, text):
    with pytest.raises(ValueError, match=r"plan\.yaml"):
        read(text_of({"more": text}))


def test_numbers_in_quotation_marks_are_numbers(read):
    plan = read(text_of({"more": "seeds: ['1', 2]\nimage_size: ['64', '96']"}))
    assert (plan.seeds, plan.image_size) == ((1, 2), (64, 96))


def test_two_models_of_a_class_do_not_take_the_place_of_one_another():
    two = [{"class_path": "Padim", "init_args": {"n_features": n}} for n in (10, 20)]
    with pytest.raises(ValueError, match="there are two entries called Padim; give them different labels in a plan"):
        read_plan(None, two, ["Assembly"])
    assert len(read_plan(None, [two[0]] * 2, ["Assembly"]).models) == 1
