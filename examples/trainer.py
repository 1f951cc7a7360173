"""A tiny Llama trained on characters by transformers' Trainer: python examples/trainer.py TEXT OUT [--steps 100]."""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

parser = argparse.ArgumentParser()
parser.add_argument("text", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--rows", type=int, default=16)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
set_seed(0)


class Rows(Dataset):
    def __init__(self, data: bytes) -> None:
        self.ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.ids) // args.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index * args.length : (index + 1) * args.length]
        return {"input_ids": row, "labels": row}


data = args.text.read_bytes()
split = int(0.9 * len(data))
shape = {"vocab_size": 256, "hidden_size": args.width, "intermediate_size": 3 * args.width, "num_hidden_layers": 4}
shape |= {"num_attention_heads": 4, "max_position_embeddings": args.length, "use_cache": False}
model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None))
options = TrainingArguments(
    output_dir=args.out,
    max_steps=args.steps,
    per_device_train_batch_size=args.rows,
    learning_rate=2e-3,
    save_steps=max(1, args.steps // 2),
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
trainer = Trainer(
    model, options, train_dataset=Rows(data[:split]), eval_dataset=Rows(data[split:]), optimizers=(optimizer, None)
)
trainer.train(resume_from_checkpoint=args.resume)
trainer.save_model(args.out / "model")
print(f"held out: {trainer.evaluate()['eval_loss']:.4f} nats a byte")
