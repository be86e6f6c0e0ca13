import json

import deit_fast
from deit_fast.data.evaluation import image_processor


def test_another_image_size_keeps_the_saved_statistics(tmp_path):
    deit_fast.DeiTImageProcessor(image_mean=0.25, crop_size=224).save_pretrained(tmp_path)
    assert image_processor(str(tmp_path), 224).size == {"height": 256, "width": 256}
    larger = image_processor(str(tmp_path), 384)
    assert larger.image_mean == 0.25 and larger.crop_size == {"height": 384, "width": 384}
    assert larger.size == {"shortest_edge": 438}


def test_images_that_are_no_squares_are_resized_to_256_of_224(tmp_path):
    processor = image_processor(None, (224, 448))
    assert processor.size == {"height": 256, "width": 512} and processor.crop_size == {"height": 224, "width": 448}
    processor.save_pretrained(tmp_path)
    assert image_processor(str(tmp_path), (224, 448)).to_dict() == processor.to_dict()
    assert image_processor(str(tmp_path), 224).crop_size == {"height": 224, "width": 224}


def test_settings_in_a_combined_file_are_found(tmp_path):
    saved = deit_fast.DeiTImageProcessor(image_mean=0.25, crop_size=224)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": saved.to_dict()}))
    assert image_processor(str(tmp_path), 224).image_mean == 0.25
