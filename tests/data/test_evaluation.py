import deit_fast
from deit_fast.data.evaluation import image_processor


def test_another_image_size_keeps_the_saved_statistics(tmp_path):
    deit_fast.DeiTImageProcessor(image_mean=0.25, crop_size=224).save_pretrained(tmp_path)
    assert image_processor(str(tmp_path), 224).size == {"height": 256, "width": 256}
    larger = image_processor(str(tmp_path), 384)
    assert larger.image_mean == 0.25 and larger.crop_size == {"height": 384, "width": 384}
    assert larger.size == {"shortest_edge": 438}
