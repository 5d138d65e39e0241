"""Pre-train clipfit-tiny: torchrun --nproc-per-node 2 train.py DATA OUT --stage STAGE [--steps N] [--batch N]

Stages, in order (each is resumed where it stopped):
  teacher  a convolutional network and a bag of words: full softmax over all concepts, 64 px
  text     the text transformer learns to say in sentences what the bag of words says
  image32  the vision transformer follows the teacher at 32 px (17 tokens)
  image    the same at 64 px, 65 tokens, only its most detailed patches at first
  settle   both towers together, all tokens, softmax over all concepts
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import loop
from icons import Icons, Sampler, augment
from probe import CLASSES, probe
from teacher import Teacher
from tiny import TEMPLATES, TextPart, VisionPart, build

DEFAULT_STEPS = {"teacher": 8000, "text": 1200, "image32": 4000, "image": 4500, "settle": 800}


def zero_shot(encode: Callable[[torch.Tensor], torch.Tensor], text: torch.Tensor, held: Icons) -> str:
    """Accuracy on the probe by style, with the text embeddings (50, D) of its classes."""
    shown = []
    with torch.no_grad():
        for style, (at, labels) in probe(held).items():
            u = torch.cat([encode(held.plain(part)) for part in at.split(256)])
            shown.append(f"{style} {(u @ text.T).argmax(1).eq(labels).float().mean():.3f} ({len(labels)})")
    return ", ".join(shown)


def train_teacher(data: Path, out: Path, steps: int, batch: int) -> None:
    icons, held = Icons(data / "train"), Icons(data / "held")
    sampler = Sampler(icons)
    torch.manual_seed(0)
    model = Teacher(sampler.vocabulary).to(memory_format=torch.channels_last)
    words = [model.words, model.log_scale]
    groups = [
        {"params": [*model.features.parameters(), *model.project.parameters()], "lr": 3e-3},
        {"params": words, "lr": 6e-3, "weight_decay": 0.0},
    ]

    def loss_of(generator: torch.Generator):
        at, labels = sampler.draw(batch, generator)
        logits = model.log_scale.exp() * model.image(augment(icons.rgba(at), generator)) @ model.text().T
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        return loss, {"loss": loss.item(), "top1": logits.argmax(1).eq(labels).float().mean().item()}

    def check() -> str:
        model.eval()
        text = model.text()[[sampler.vocabulary.index(c) for c in CLASSES]]
        shown = zero_shot(model.image, text, held)
        model.train()
        return shown

    loop.run("teacher", model, loop.adamw(groups), loss_of, steps, out, check=check)


def load_teacher(out: Path, vocabulary: list[str]) -> Teacher:
    teacher = Teacher(vocabulary)
    teacher.load_state_dict(loop.weights(out / "teacher.safetensors"))
    return teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def random_bags(
    teacher: Teacher, sampler: Sampler, n: int, generator: torch.Generator
) -> tuple[list[str], torch.Tensor]:
    """n captions and the teacher's embeddings of their words: half are concepts, half are words thrown together."""
    words = sorted({w for c in sampler.vocabulary for w in c.split()})
    captions = [sampler.vocabulary[i] for i in torch.randperm(len(sampler.vocabulary), generator=generator)[: n // 2]]
    for size in torch.randint(1, 4, (n - len(captions),), generator=generator).tolist():
        captions.append(" ".join(words[i] for i in torch.randint(len(words), (size,), generator=generator)))
    place = {w: i for i, w in enumerate(words)}
    targets = torch.stack([teacher.words[[place[w] for w in c.split()]].sum(0) for c in captions])
    return captions, F.normalize(targets, dim=1)


def train_text(data: Path, out: Path, steps: int, batch: int) -> None:
    sampler = Sampler(Icons(data / "train"))
    teacher = load_teacher(out, sampler.vocabulary)
    torch.manual_seed(1)
    model = TextPart(build())

    def loss_of(generator: torch.Generator):
        captions, targets = random_bags(teacher, sampler, batch, generator)
        pick = torch.randint(len(TEMPLATES), (len(captions),), generator=generator).tolist()
        t = model([TEMPLATES[k].format(c) for k, c in zip(pick, captions, strict=True)])
        contrast = F.cross_entropy(30 * t @ targets.T, torch.arange(len(t)))
        away = 1 - (t * targets).sum(1).mean()
        return contrast + 10 * away, {"contrast": contrast.item(), "away": away.item()}

    loop.run("text", model, loop.adamw(loop.decayed(model.parameters(), 1e-3)), loss_of, steps, out)


def train_image(data: Path, out: Path, steps: int, batch: int, side: int, tokens: int) -> None:
    """The vision transformer learns the teacher's embedding and its whole softmax over all concepts."""
    icons, held = Icons(data / "train"), Icons(data / "held")
    sampler = Sampler(icons)
    teacher = load_teacher(out, sampler.vocabulary)
    text = teacher.text()
    scale = teacher.log_scale.exp()
    name = "image32" if side == 32 else "image"
    torch.manual_seed(2)
    model = VisionPart(build(), side)
    if side == 64:
        earlier = out / "image32.safetensors"
        if earlier.exists():
            model.grow_from(loop.weights(earlier))

    def loss_of(generator: torch.Generator):
        at, labels = sampler.draw(batch, generator)
        picture = augment(icons.rgba(at), generator)
        with torch.no_grad():
            v = teacher.image(picture)
            soft = (scale * v @ text.T).softmax(1)
        u = model(F.avg_pool2d(picture, 2) if side == 32 else picture, tokens)
        logits = scale * u @ text.T
        hard = F.cross_entropy(logits, labels)
        softly = -(soft * logits.log_softmax(1)).sum(1).mean()
        away = 1 - (u * v).sum(1).mean()
        top1 = logits.argmax(1).eq(labels).float().mean()
        return 0.5 * hard + 0.5 * softly + 4 * away, {"hard": hard.item(), "away": away.item(), "top1": top1.item()}

    def check() -> str:
        classes = text[[sampler.vocabulary.index(c) for c in CLASSES]]
        return zero_shot(lambda x: model(F.avg_pool2d(x, 2) if side == 32 else x, 64), classes, held)

    loop.run(name, model, loop.adamw(loop.decayed(model.parameters(), 1e-3)), loss_of, steps, out, check=check)


def train_settle(data: Path, out: Path, steps: int, batch: int) -> None:
    """Both towers, every token: softmax over the batch's concepts and as many others, still leaning on the teacher."""
    icons, held = Icons(data / "train"), Icons(data / "held")
    sampler = Sampler(icons)
    teacher = load_teacher(out, sampler.vocabulary)
    text, scale = teacher.text(), teacher.log_scale.exp()
    clip = build()
    vision, captions = VisionPart(clip, 64), TextPart(clip)
    clip.load_state_dict({**towers(out), "logit_scale": teacher.log_scale.detach().clone()})

    def loss_of(generator: torch.Generator):
        at, labels = sampler.draw(batch, generator)
        picture = augment(icons.rgba(at), generator)
        others = torch.randint(len(text), (batch,), generator=generator)
        concepts, place = torch.cat([labels, others]).unique(return_inverse=True)
        pick = torch.randint(len(TEMPLATES), (len(concepts),), generator=generator).tolist()
        t = captions([TEMPLATES[k].format(sampler.vocabulary[c]) for k, c in zip(pick, concepts.tolist(), strict=True)])
        with torch.no_grad():
            v = teacher.image(picture)
            soft = (scale * v @ text[concepts].T).softmax(1)
        u = vision(picture, 64)
        logits = clip.logit_scale.exp() * u @ t.T
        hard = F.cross_entropy(logits, place[:batch])
        softly = -(soft * logits.log_softmax(1)).sum(1).mean()
        away = 1 - (u * v).sum(1).mean() + 1 - (t * text[concepts]).sum(1).mean()
        shown = {"hard": hard.item(), "away": away.item(), "scale": clip.logit_scale.exp().item()}
        return 0.5 * hard + 0.5 * softly + 2 * away, shown

    def check() -> str:
        with torch.no_grad():
            classes = captions([f"a photo of a {c}" for c in CLASSES])
        return zero_shot(lambda x: vision(x, 64), classes, held)

    loop.run(
        "settle", clip, loop.adamw(loop.decayed(clip.parameters(), 4e-4)), loss_of, steps, out, warmup=50, check=check
    )


def towers(out: Path) -> dict[str, torch.Tensor]:
    """The text tower and the vision tower of their own stages, under open_clip's names."""
    return {**loop.weights(out / "text.safetensors"), **loop.weights(out / "image.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", required=True, choices=sorted(DEFAULT_STEPS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=64, help="pictures a step in each process")
    parser.add_argument("--tokens", type=int, default=64, help="patches kept, the most detailed first (image)")
    args = parser.parse_args()
    if loop.PROCESSES > 1:
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    steps = args.steps or DEFAULT_STEPS[args.stage]
    if args.stage == "teacher":
        train_teacher(args.data, args.out, steps, args.batch)
    elif args.stage == "text":
        train_text(args.data, args.out, steps, args.batch)
    elif args.stage in ("image32", "image"):
        train_image(args.data, args.out, steps, args.batch, 32 if args.stage == "image32" else 64, args.tokens)
    else:
        train_settle(args.data, args.out, steps, args.batch)


if __name__ == "__main__":
    main()
