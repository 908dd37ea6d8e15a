import re
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models import Padim
from PIL import Image

from anomalib_ot import Foct
from anomalib_ot.explain import ExplainingVisualizer
from anomalib_ot.explain.evidence import image_scores


@pytest.fixture
def batch(tmp_path):
    """Prepared images with scores that are all clipped to 1, as after normalisation."""
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.new("RGB", (80, 72)).save(path)
    image = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    return ImageBatch(
        image=image, image_path=[str(path) for path in paths], pred_score=torch.ones(5), anomaly_map=image[:, 0]
    )


@pytest.fixture
def trainer(tmp_path):
    return SimpleNamespace(default_root_dir=tmp_path / "run", datamodule=None, ckpt_path=None)


def test_it_explains_the_pictures_with_the_highest_scores_before_clipping(fitted, pictures, batch, trainer, tmp_path):
    model = fitted("WtFlow", 0.5)
    visualizer = ExplainingVisualizer(count=2, views=["evidence"])
    visualizer.on_test_start(trainer, model)
    visualizer.on_test_batch_end(trainer, model, None, batch, 0)
    visualizer.on_test_end(trainer, model)
    shown = {path.parent.name for path in (tmp_path / "run" / "explain").rglob("evidence.json")}
    (template,) = pictures(model)
    scores = {}
    for number, image in enumerate(batch.image):
        scores |= {str(number): image_scores(model, [type(template)("", image, image)])[""]}
    assert shown == set(sorted(scores, key=scores.get)[-2:])
    assert len(list((tmp_path / "run" / "images").rglob("*.png"))) == 5


def test_unknown_views_and_other_models_are_refused_before_the_run():
    with pytest.raises(ValueError, match="Foct has no views flow"):
        ExplainingVisualizer(views=["flow"]).setup(None, Foct.__new__(Foct), "test")
    with pytest.raises(ValueError, match="Padim has no views"):
        ExplainingVisualizer().setup(None, Padim.__new__(Padim), "test")
    with pytest.raises(ValueError, match="count must be at least 1, or None, not 0"):
        ExplainingVisualizer(count=0)


@pytest.mark.parametrize(("given", "folder"), [(".", "explain"), ("pictures", "explain"), ("a/b", "a/explain")])
def test_views_lie_beside_the_folder_of_the_pictures(fitted, batch, trainer, tmp_path, monkeypatch, given, folder):
    monkeypatch.chdir(tmp_path)
    model = fitted("WtFlow", 0.5)
    visualizer = ExplainingVisualizer(count=1, views=["evidence"], output_dir=given)
    visualizer.setup(trainer, model, "test")
    visualizer.on_test_start(trainer, model)
    visualizer.on_test_batch_end(trainer, model, None, batch, 0)
    visualizer.on_test_end(trainer, model)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.html")] == [f"{folder}/index.html"]


def test_no_file_of_the_working_folder_is_written_over(fitted, batch, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / tmp_path.name / "0.png"
    kept.parent.mkdir()
    kept.write_text("a picture of the same name")
    visualizer = ExplainingVisualizer(count=1, views=["evidence"], output_dir=".")
    with pytest.raises(FileExistsError, match=r"holds 0\.png, which anomalib-ot did not write there"):
        visualizer.on_test_batch_end(trainer, fitted("WtFlow", 0.5), None, batch, 0)
    assert kept.read_text() == "a picture of the same name"
    kept.unlink()
    for _ in range(2):
        visualizer.on_test_batch_end(trainer, fitted("WtFlow", 0.5), None, batch, 0)
    assert Image.open(kept).size


def test_what_could_not_be_drawn_or_written_after_the_test_is_refused_before_it(fitted, trainer):
    model = fitted("WtFlow", 0.5)
    for formats in (["gif"], []):
        with pytest.raises(ValueError, match="each of formats must be 'png' or 'svg' or 'pdf'"):
            ExplainingVisualizer(formats=formats)
    with pytest.raises(ValueError, match="the view flow cannot be drawn: there are no normal images"):
        ExplainingVisualizer(views=["flow"]).on_test_start(trainer, model)
    for name in ("index.html", "WtFlow/model.ckpt"):
        path = trainer.default_root_dir / "explain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("work of days")
        with pytest.raises(FileExistsError, match=re.escape(f"{path.parent} holds {path.name}, which")):
            ExplainingVisualizer().setup(trainer, model, "test")
        path.unlink()
