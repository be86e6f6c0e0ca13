"""Pretrains a DeiT on images without labels: it fills in the squares that are masked (SimMIM).

    python examples/masked_image_modeling.py --do_train --do_eval --output_dir runs \\
        --train_dir flowers/train --validation_dir flowers/validation \\
        --image_size 224 --patch_size 16 --mask_patch_size 32 --mask_ratio 0.6

Each directory has images in folders, whose names don't matter. A model starts from a checkpoint
(`--model_name_or_path`), or at random with DeiTConfig's settings, which `--config_overrides` changes. The arguments are
those of transformers' `run_mim.py`, of which these are the ones read, and TrainingArguments'.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from deit_fast.transformers import DeiTConfig, DeiTForMaskedImageModeling, DeiTImageProcessor


@dataclass
class Arguments:
    train_dir: str
    validation_dir: str
    model_name_or_path: str | None = None
    config_overrides: str = ""  # such as hidden_size=384,num_attention_heads=6
    image_size: int | None = None  # this and the next as the configuration has them
    patch_size: int | None = None
    mask_patch_size: int = 32
    mask_ratio: float = 0.6


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    arguments, training = parser.parse_args_into_dataclasses(args)
    # By them Trainer knows that an evaluation has a loss.
    training.label_names = ["bool_masked_pos"]
    set_seed(training.seed)
    config = config_for(arguments)
    sides = {"height": config.image_size, "width": config.image_size}
    name = arguments.model_name_or_path
    if name:
        processor = DeiTImageProcessor.from_pretrained(name, size=sides, crop_size=sides)
        model = DeiTForMaskedImageModeling.from_pretrained(name, config=config)
    else:
        processor = DeiTImageProcessor(size=sides, crop_size=sides)
        model = DeiTForMaskedImageModeling(config)
    # SimMIM's crops.
    pixel_values = Compose(
        [
            RandomResizedCrop(config.image_size, scale=(0.67, 1.0)),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize(processor.image_mean, processor.image_std),
        ]
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=ImageFolder(arguments.train_dir, pixel_values),
        eval_dataset=ImageFolder(arguments.validation_dir, pixel_values),
        data_collator=masking(config, arguments.mask_patch_size, arguments.mask_ratio),
        processing_class=processor,
    )
    if training.do_train:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
    return trainer.evaluate() if training.do_eval else {}


def config_for(arguments: Arguments) -> DeiTConfig:
    name = arguments.model_name_or_path
    config = DeiTConfig.from_pretrained(name) if name else DeiTConfig()
    if arguments.config_overrides:
        config.update_from_string(arguments.config_overrides)
    config.image_size = arguments.image_size or config.image_size
    config.patch_size = arguments.patch_size or config.patch_size
    config.encoder_stride = config.patch_size  # so that each pixel is predicted
    return config


def masking(config: DeiTConfig, mask_patch_size: int, mask_ratio: float) -> Callable[[list], dict[str, Tensor]]:
    """Stacks images, and masks a share of each one's squares of `mask_patch_size` pixels: for each patch a bool."""
    if config.image_size % mask_patch_size or mask_patch_size % config.patch_size:
        raise ValueError(
            f"mask_patch_size {mask_patch_size} must divide the image's {config.image_size} pixels, "
            f"and the patch's {config.patch_size} must divide it"
        )
    side = config.image_size // mask_patch_size
    masked = math.ceil(mask_ratio * side**2)
    patches = mask_patch_size // config.patch_size

    def collate(examples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in examples])
        squares = torch.rand(len(images), side**2).argsort(1) < masked
        masks = squares.view(-1, side, side).repeat_interleave(patches, 1).repeat_interleave(patches, 2)
        return {"pixel_values": images, "bool_masked_pos": masks.flatten(1)}

    return collate


if __name__ == "__main__":
    print(main())
