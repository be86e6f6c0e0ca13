"""Writes the checkpoints and outputs in tests/keras/data: those of transformers 4's own TensorFlow classes.

In an environment of its own, which the tests do without:

    pip install transformers==4.49.0 tensorflow-cpu==2.21.0 tf-keras==2.21.0
    TF_USE_LEGACY_KERAS=1 python tests/keras/make_reference.py
"""

from pathlib import Path

import numpy as np
import transformers

DATA = Path(__file__).parent / "data"
CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 5,
}
PATCHES = (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
SHARD = "24KB"


def randomise(model, rng: np.random.Generator) -> None:
    """transformers starts tokens, positions and biases at zero, where a mistake in them would not show."""
    for weight in model.weights:
        centre = 1.0 if "gamma" in weight.name else 0.0
        weight.assign(rng.normal(centre, 0.2, weight.shape).astype(np.float32))


def arrays(outputs) -> dict[str, np.ndarray]:
    return {
        name: np.stack([each.numpy() for each in value]) if isinstance(value, tuple) else value.numpy()
        for name, value in outputs.items()
    }


def main() -> None:
    rng = np.random.default_rng(0)
    pixel_values = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
    mask = rng.random((2, PATCHES)) < 0.5
    arguments = {
        "TFDeiTModel": {},
        "TFDeiTForMaskedImageModeling": {"bool_masked_pos": mask},
        "TFDeiTForImageClassification": {"labels": np.array([3, 1])},
        "TFDeiTForImageClassificationWithTeacher": {},
    }
    for name, others in arguments.items():
        model = getattr(transformers, name)(transformers.DeiTConfig(**CONFIG))
        given = {"pixel_values": pixel_values, **others}
        model(**given)  # builds it
        randomise(model, rng)
        model.save_pretrained(DATA / name)
        outputs = model(**given, output_hidden_states=True, output_attentions=True)
        as_tuple = model(**given, return_dict=False)
        np.savez_compressed(
            DATA / name / "outputs.npz",
            fields=list(outputs),
            tuple_shapes=np.array([str(tuple(each.shape)) for each in as_tuple]),
            **{f"given_{key}": value for key, value in given.items()},
            **arrays(outputs),
        )
        if name == "TFDeiTForImageClassification":
            model.save_pretrained(DATA / "sharded", max_shard_size=SHARD)
            model.save_pretrained(DATA / "safetensors", safe_serialization=True)


if __name__ == "__main__":
    main()
