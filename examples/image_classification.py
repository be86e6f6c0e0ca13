"""Fine-tunes a DeiT on a folder of images: its class head alone, or both heads with a teacher.

    python examples/image_classification.py --do_train --do_eval --output_dir runs \\
        --model_name_or_path facebook/deit-small-patch16-224 --ignore_mismatched_sizes \\
        --train_dir flowers/train --validation_dir flowers/validation
    python examples/image_classification.py --do_train --do_eval --output_dir runs \\
        --model_name_or_path facebook/deit-small-distilled-patch16-224 --ignore_mismatched_sizes \\
        --train_dir flowers/train --validation_dir flowers/validation \\
        --teacher_name_or_path a-classifier-of-these-flowers --distillation hard

Each class is a folder of its name. The arguments are those of transformers' `run_image_classification.py`, of which
these are the ones read, and TrainingArguments'; the teacher's are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.datasets import ImageFolder
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from deit_fast.transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    TeacherInputs,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_dir: str
    validation_dir: str
    ignore_mismatched_sizes: bool = False  # for a checkpoint with other classes
    teacher_name_or_path: str | None = None
    distillation: str = "hard"
    alpha: float = 0.5
    tau: float = 1.0


def main(args: Sequence[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    arguments, training = parser.parse_args_into_dataclasses(args)
    set_seed(training.seed)
    processor = DeiTImageProcessor.from_pretrained(arguments.model_name_or_path)

    def pixel_values(image: Any) -> torch.Tensor:
        return processor(image, return_tensors="pt").pixel_values[0]

    train = ImageFolder(arguments.train_dir, pixel_values)
    validation = ImageFolder(arguments.validation_dir, pixel_values)
    trainer = Trainer(
        model_for(arguments, train.classes, processor),
        training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        compute_metrics=accuracy,
        processing_class=processor,
    )
    if training.do_train:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
    return trainer.evaluate() if training.do_eval else {}


def model_for(arguments: Arguments, classes: list[str], processor: DeiTImageProcessor) -> torch.nn.Module:
    options = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "ignore_mismatched_sizes": arguments.ignore_mismatched_sizes,
    }
    if arguments.teacher_name_or_path is None:
        return DeiTForImageClassification.from_pretrained(arguments.model_name_or_path, **options)
    teacher = AutoModelForImageClassification.from_pretrained(arguments.teacher_name_or_path).eval()
    numbers = teacher.config.label2id
    return DeiTForImageClassificationWithTeacher.from_pretrained(
        arguments.model_name_or_path,
        teacher=teacher,
        distillation=arguments.distillation,
        alpha=arguments.alpha,
        tau=arguments.tau,
        teacher_inputs=TeacherInputs(processor, AutoImageProcessor.from_pretrained(arguments.teacher_name_or_path)),
        # The teacher may have them in another order, and others beside them.
        teacher_classes=[numbers[name] for name in classes] if numbers.keys() >= set(classes) else None,
        **options,
    )


def collate(examples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


if __name__ == "__main__":
    print(main())
