"""Somebody's script, which knows nothing of deit_fast: timm's `train.py` in short, with its arguments.

timm's own is in its repository, not in its package.
"""

import argparse

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TokenDistillationTask
from timm.utils import accuracy, random_seed
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--kd-model-name")
    parser.add_argument("--kd-distill-type", default="hard")
    parser.add_argument("--no-aug", action="store_true")
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    random_seed(args.seed)
    options = {"img_size": args.img_size, "num_classes": args.num_classes}
    options |= {name: int(number) for name, number in (each.split("=") for each in args.model_kwargs)}
    model = timm.create_model(args.model, drop_path_rate=args.drop_path, **options)
    if args.kd_model_name:
        teacher = timm.create_model(args.kd_model_name, **options)
        task = TokenDistillationTask(model, teacher, distill_type=args.kd_distill_type, verbose=False)
    else:
        task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
    train, validation = (
        create_loader(
            create_dataset("", args.data_dir, split=split),
            (3, args.img_size, args.img_size),
            args.batch_size,
            is_training=split == "train",
            no_aug=args.no_aug,
            num_workers=0,
            persistent_workers=False,
            use_prefetcher=False,
        )
        for split in ("train", "validation")
    )
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    for _ in range(args.epochs):
        task.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()

    model.eval()
    with torch.inference_mode():
        results = [(model(images), labels) for images, labels in validation]
    logits, labels = (torch.cat(each) for each in zip(*results, strict=True))
    loss, top1 = nn.functional.cross_entropy(logits, labels), accuracy(logits, labels)[0]
    print({"eval_loss": loss.item(), "eval_accuracy": top1.item() / 100})


if __name__ == "__main__":
    main()
