"""Train one matrix of a model with the Trainer of transformers, whose optimizer works in the backward pass.

    python examples/localized_in_a_trainer.py --model ./Llama-3-8B --module model.layers.22.mlp.down_proj

Dataset, loss, schedule and logs are the Trainer's. No gradient of the matrix is stored, and nothing else has one. For
several backward passes a step give `accumulate=True` to `localized` beside `gradient_accumulation_steps`. Needs the
package accelerate, as any Trainer does.
"""

import argparse
import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from fastedit import ops
from fastedit.demo import World, checkpoint_path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=checkpoint_path(), help="folder or hub name")
parser.add_argument("--module", default="model.layers.5.mlp.down_proj", help="path of a linear layer")
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--epochs", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False)
requests, data = World().requests(10), []
for request in requests:
    prompt = tokenizer(request.prompt).input_ids
    target = tokenizer(f" {request.target}", add_special_tokens=False).input_ids
    data.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})

with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=10,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,  # there is no gradient to clip: `localized` takes max_norm
        use_cpu=not torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(ops.localized(model.get_submodule(args.module).to(settings.device), lr=args.lr), None),
    )
    trainer.train()

model.eval()
for request in requests:
    ids = tokenizer(request.prompt, return_tensors="pt").input_ids.to(model.device)
    count = len(tokenizer(f" {request.target}", add_special_tokens=False).input_ids)
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :])
    print(f"{request.prompt} →{answer} (wanted: {request.target})")
