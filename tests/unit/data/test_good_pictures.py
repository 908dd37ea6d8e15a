import pytest
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from anomalib_ot.data import GoodPictures


def ready(folder, count, **arguments):
    (folder / "good").mkdir()
    for index in range(count):
        Image.new("RGB", (8, 8)).save(folder / "good" / f"{index}.png")
    data = GoodPictures(folder, "good", num_workers=0, **arguments)
    data.setup(TrainerFn.FITTING)
    return data


def paths(dataset):
    return set(dataset.samples.image_path)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (10, 2), (40, 8)])
def test_a_folder_of_good_pictures_alone_holds_some_out(tmp_path, count, held_out):
    data = ready(tmp_path, count)
    assert paths(data.val_data) == paths(data.test_data)
    assert len(data.val_data) == held_out
    assert paths(data.train_data).isdisjoint(paths(data.val_data))
    assert len(data.train_data) + held_out == count


@pytest.mark.parametrize(("count", "arguments"), [(1, {}), (3, {"held_out": 0})])
def test_without_held_out_pictures_it_validates_on_what_it_trains_on(tmp_path, count, arguments):
    data = ready(tmp_path, count, **arguments)
    assert paths(data.train_data) == paths(data.val_data) == paths(data.test_data)
    assert len(data.train_data) == count


def test_more_held_out_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="held_out must be below the number of images, 2, not 2"):
        ready(tmp_path, 2, held_out=2)
    with pytest.raises(ValueError, match="held_out must be at least 0"):
        GoodPictures(tmp_path, "good", held_out=-1)


def test_images_are_left_out(tmp_path):
    data = ready(tmp_path, 5, held_out=0, left_out=["good/1.png", str(tmp_path / "good/3.png")])
    assert {path.rpartition("/")[2] for path in paths(data.train_data)} == {"0.png", "2.png", "4.png"}
    with pytest.raises(ValueError, match=r"left_out must name images .* one of its 5 images"):
        GoodPictures(tmp_path, "good", left_out=["1.png"]).setup(TrainerFn.FITTING)
    with pytest.raises(ValueError, match="held_out must be below the number of images, 0, not 0"):
        GoodPictures(tmp_path, "good", held_out=0, left_out=[f"good/{index}.png" for index in range(5)]).setup()
