"""A DeiT by its TensorFlow name learns scikit-learn's handwritten digits with Keras's `fit`, in four minutes.

pip install ".[demo,keras]"
python examples/keras_digits.py
"""

import argparse

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import InterpolationMode, RandomAffine

from deit_fast.keras import DeiTConfig, TFDeiTForImageClassification  # before keras, which it puts on PyTorch
from deit_fast.train.digits import Split, load

import keras  # isort: skip

BATCH_SIZE = 64


class Digits(Dataset):
    """[3, 16, 16] from -1 to 1, each turned, moved and stretched a little anew where they are `varied`."""

    def __init__(self, split: Split, varied: bool):
        pixels = torch.from_numpy(split.pixels)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
        self.images = torch.nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear")
        self.labels = split.labels
        affine = {"degrees": 11, "translate": (0.075, 0.075), "scale": (0.9, 1.1), "fill": -1}
        self.vary = RandomAffine(**affine, interpolation=InterpolationMode.BILINEAR) if varied else torch.nn.Identity()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.vary(self.images[index]), int(self.labels[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps

    keras.utils.set_random_seed(0)
    train, test = load()
    learned = Digits(train, varied=True)
    sampler = RandomSampler(learned, replacement=True, num_samples=steps * BATCH_SIZE)
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 384}
    model = TFDeiTForImageClassification(DeiTConfig(image_size=16, patch_size=4, num_labels=10, **sizes))
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=2e-3, warmup_steps=steps // 18)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.05), metrics=["accuracy"])
    model.fit(DataLoader(learned, BATCH_SIZE, sampler=sampler), verbose=2)
    loss, accuracy = model.evaluate(DataLoader(Digits(test, varied=False), BATCH_SIZE), verbose=0)
    print(f"{len(test.labels)} other digits: {100 * accuracy:.2f} % right, loss {loss:.4f}")


if __name__ == "__main__":
    main()
