import pytest
from anomalib.data import Folder
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_ot import Assembly, FewShot


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


def assembly(root):
    return Assembly(root, n_train=8, n_validation=2, n_test=3)


def ready(data):
    data.prepare_data()
    data.setup(TrainerFn.FITTING)
    return data


def paths(dataset):
    return list(dataset.samples.image_path)


def test_keeps_so_many_of_the_training_images(root):
    whole, few = ready(assembly(root)), ready(FewShot(assembly(root), 3, 1))
    assert len(few.train_data) == 3
    assert set(paths(few.train_data)) < set(paths(whole.train_data))
    for part in ("val_data", "test_data"):
        assert paths(getattr(few, part)) == paths(getattr(whole, part))


def test_choice_depends_on_the_seed_and_grows(root):
    drawn = {
        (shots, seed): set(paths(ready(FewShot(assembly(root), shots, seed)).train_data))
        for shots in (1, 2, 4)
        for seed in (0, 1)
    }
    assert drawn[1, 0] < drawn[2, 0] < drawn[4, 0]
    assert drawn[4, 0] == set(paths(ready(FewShot(assembly(root), 4, 0)).train_data))
    assert drawn[4, 0] != drawn[4, 1]


def test_data_module_drawn_from_is_not_changed(root):
    inner = assembly(root)
    few = ready(FewShot(inner, 2))
    assert len(ready(inner).train_data) == 8
    assert few.category == "tray"
    assert few.name == "Assembly_2shot_0"


def test_batches_and_augmentations_are_those_of_the_data_module(root):
    inner = assembly(root)
    inner.train_batch_size = 2
    few = ready(FewShot(inner, 3))
    assert [len(batch.image) for batch in few.train_dataloader()] == [2, 1]
    assert len(few.predict_dataloader().dataset) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"shots": 0}, "shots must be at least 1, not 0"), ({"seed": -1}, "seed must be at least 0")],
)
def test_bad_settings(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        FewShot(assembly(root), **arguments)


def test_more_shots_than_images(root):
    with pytest.raises(ValueError, match="shots is 9, but Assembly has 8 training images"):
        ready(FewShot(assembly(root), 9))


def test_unreadable_support_image_is_named(tmp_path):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_text("no picture")
    data = Folder("broken", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0, test_split_mode="none")
    with pytest.raises(ValueError, match=r"the support image .*0\.png cannot be read"):
        ready(FewShot(data, 1))
