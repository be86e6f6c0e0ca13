"""examples/masked_image_modeling.py: its masks, and a run from random weights and one from what it saved."""

from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")

from examples.masked_image_modeling import main, masking  # noqa: E402
from tests.swap.transformers_models import config  # noqa: E402


def test_whole_squares_are_masked_and_their_share_is_the_ratio() -> None:
    images = [(torch.full((3, 32, 32), float(i)), 0) for i in range(20)]
    batch = masking(config(patch_size=4), mask_patch_size=8, mask_ratio=0.3)(images)
    assert torch.equal(batch["pixel_values"][7], images[7][0])
    squares = batch["bool_masked_pos"].view(20, 4, 2, 4, 2).transpose(2, 3)
    assert torch.equal(squares.any(-1).any(-1), squares.all(-1).all(-1))
    assert squares[..., 0, 0].sum((1, 2)).eq(5).all()  # ceil(0.3 * 16)
    assert len({tuple(mask.tolist()) for mask in batch["bool_masked_pos"]}) > 10


@pytest.mark.parametrize(("patch_size", "mask_patch_size"), [(8, 12), (8, 4), (4, 64)])
def test_sizes_that_do_not_divide_are_refused(patch_size: int, mask_patch_size: int) -> None:
    with pytest.raises(ValueError, match="must divide"):
        masking(config(patch_size=patch_size), mask_patch_size, 0.6)


def test_a_run_saves_a_folder_that_transformers_loads_and_the_next_run_starts_from(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for part in ("train", "validation"):
        (tmp_path / part / "any").mkdir(parents=True)
        for number in range(8):
            pixels = noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / "any" / f"{number}.png")
    given = f"--do_train --do_eval --use_cpu --disable_tqdm True --train_dir {tmp_path}/train --max_steps 2 "
    given += f"--validation_dir {tmp_path}/validation --mask_patch_size 16 --learning_rate 1e-3"
    small = "hidden_size=48,num_hidden_layers=1,num_attention_heads=3,intermediate_size=96"
    sizes = f"--image_size 32 --patch_size 8 --config_overrides {small}"
    assert np.isfinite(main(f"{given} {sizes} --output_dir {tmp_path}/first".split())["eval_loss"])
    loaded = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "first")
    assert type(loaded) is transformers.DeiTForMaskedImageModeling
    assert (loaded.config.image_size, loaded.config.patch_size, loaded.config.encoder_stride) == (32, 8, 8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "first")
    assert (processor.size["height"], processor.crop_size["width"]) == (32, 32)

    again = f"{given} --learning_rate 0 --model_name_or_path {tmp_path}/first --output_dir {tmp_path}/second"
    assert np.isfinite(main(again.split())["eval_loss"])
    weights = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "second").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in loaded.state_dict().items())
