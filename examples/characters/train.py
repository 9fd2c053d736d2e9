"""A small GPT on real text (the sources of Python's own library), in a plain loop with `Checkpointer`.

    python examples/characters/train.py --steps 300 --folder runs/characters

Kill it anywhere and run it again: it goes on from the newest good checkpoint, with the same batches and the same
dropout, and ends with the digest that an unbroken run ends with.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import nn

from milepost import Checkpointer, RandomState
from milepost.engine.retention import KeepBest, KeepNewest

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 16


def text() -> torch.Tensor:
    """About 400 kB of Python, as bytes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))[:20]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.attend(self.norm_1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.join(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.token.weight  # tied: stored once, and tied again after a restore

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def batch_of(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Random places in the text: the state of torch's generator says which."""
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,))
    rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("runs/characters"))
    chosen = parser.parse_args()

    torch.manual_seed(0)
    data, model = text(), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.steps)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "random": RandomState()}

    with Checkpointer(chosen.folder, keep=KeepNewest(2) | KeepBest(1), monitor="loss") as checkpointer:
        done = checkpointer.restore(state)
        print(f"starting at step {done + 1}", flush=True)
        for step in range(done + 1, chosen.steps + 1):
            tokens, targets = batch_of(data)
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % chosen.every == 0:
                checkpointer.save(step, state, {"loss": loss.item()})
                print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    print(f"weights {digest(model)}")


if __name__ == "__main__":
    main()
