import pytest

from deit_fast.data.labels import default_labels, read_labels


@pytest.mark.parametrize(
    "text",
    ["cat\ndog\nbird\n", '["cat", "dog", "bird"]', '{"1": "dog", "0": "cat", "2": "bird"}'],
    ids=["lines", "list", "dict"],
)
def test_label_files(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    assert read_labels(str(tmp_path / "labels")) == ["cat", "dog", "bird"]


def test_imagenet_names_come_from_timm():
    pytest.importorskip("timm")
    labels = default_labels(1000, trained=True)
    assert len(labels) == 1000 and labels[0].startswith("tench")


def test_random_weights_are_not_given_imagenet_names():
    assert default_labels(1000, trained=False) == [str(index) for index in range(1000)]
